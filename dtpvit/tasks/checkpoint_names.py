"""A task's checkpoint under the names of its model alone, so that open_clip and timm load it unchanged."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["use_model_names"]


def use_model_names(task: nn.Module) -> None:
    """Let the state dict of ``task`` leave out the ``model.`` before the names of its attribute ``model``."""
    task.register_state_dict_post_hook(_strip_model)
    task.register_load_state_dict_pre_hook(_add_model)


def _strip_model(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        state[prefix + name.removeprefix(f"{prefix}model.")] = state.pop(name)


def _add_model(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    mine = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    for name in [name for name in state if name.startswith(prefix)]:
        inner = name.removeprefix(prefix)
        if inner not in mine and f"model.{inner}" in mine:
            state[f"{prefix}model.{inner}"] = state.pop(name)
