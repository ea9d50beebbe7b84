"""Vision Transformers that spend tokens only where an image needs them."""

import importlib
from typing import TYPE_CHECKING

from dtpvit import _import_hook

if TYPE_CHECKING:
    from dtpvit.interop.assistant import load_assistant
    from dtpvit.interop.create import create_clip, create_encoder

__all__ = ["__version__", "create_clip", "create_encoder", "load_assistant"]

__version__ = "0.1.0"

_LAZY = {"create_clip": "create", "create_encoder": "create", "load_assistant": "assistant"}


def __getattr__(name: str) -> object:
    """Import the builders when they are first asked for: torch takes seconds, ``import dtpvit`` must not."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"dtpvit.interop.{_LAZY[name]}")
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_import_hook.install()
