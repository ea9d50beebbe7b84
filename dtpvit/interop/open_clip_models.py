"""Our dual encoders as open_clip models."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CONFIGS", "register"]

CONFIGS = Path(__file__).parent / "model_configs"


def register() -> None:
    """Tell open_clip the names of our models; safe to call again."""
    import open_clip

    known = set(open_clip.list_models())
    if any(path.stem not in known for path in CONFIGS.glob("*.json")):
        open_clip.add_model_config(CONFIGS)
