"""What lmms-eval looks for: its models by name, each a class of the module of that name."""

from typing import Any

__all__ = ["AVAILABLE_MODELS", "manifest"]

AVAILABLE_MODELS = {"dtpvit": "DTPViT"}


def manifest() -> Any:
    """The same for lmms-eval's entry points."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    name, class_name = next(iter(AVAILABLE_MODELS.items()))
    return ModelManifest(model_id=name, simple_class_path=f"{__name__}.{name}.{class_name}")
