"""Which parts of a classifier learn, which stand still, and how the pooling rate approaches its target."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import nn

from dtpvit.encoder import ImageEncoder
from dtpvit.encoder.reducers import GridPooling
from dtpvit.encoder.reducers.boundary_pooling import BoundaryPooling
from dtpvit.encoder.reducers.selection import TokenSelection
from dtpvit.errors import UserError
from dtpvit.interop.timm_models import TimmEncoder

__all__ = ["CompressionWarmup", "Mode", "freeze", "set_training", "train_reducers"]

Mode = Literal["adapt", "linear_probe", "frozen", "finetune"]


def freeze(model: TimmEncoder, mode: Mode) -> None:
    """Let only those parameters require a gradient that ``mode`` trains.

    ``adapt``: the reducers, such as boundary predictors. ``linear_probe``: the head. ``frozen``: both of these.
    ``finetune``: everything.

    Raises:
        UserError: If the mode is none of these, or nothing would learn.
    """
    if mode not in get_args(Mode):
        raise UserError(f"mode is {mode!r}; expected one of {', '.join(get_args(Mode))}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(mode == "finetune" or name.startswith(_LEARNING[mode]))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"mode {mode!r} trains the reducers, and this model's have nothing to learn; use another mode")


def set_training(model: TimmEncoder, mode: Mode) -> None:
    """Training mode for what learns, evaluation mode, without stochastic depth, for what stands still."""
    model.train(mode == "finetune")
    if mode in ("adapt", "frozen"):
        train_reducers(model)
    model.head.train(mode != "adapt")


def train_reducers(encoder: ImageEncoder) -> None:
    """Training mode for the reducers of an encoder that otherwise stands still."""
    encoder.eval()
    encoder.reducers.train()
    # The encoder's own flag, not its blocks': it says whether reducers are given seeds to draw from.
    encoder.training = True


_LEARNING: dict[str, tuple[str, ...]] = {
    "adapt": ("reducers.",),
    "linear_probe": ("head.",),
    "frozen": ("head.", "reducers."),
}


class CompressionWarmup:
    """Moves every reducer from keeping all tokens to its target: compression linearly, a keep rate along half a cosine.

    Keep rates have the curve of EViT (Liang et al. 2022), which begins after a while at 1. A function of the step
    alone, so that a resumed run is where it would have been. Reducers whose rate is their window's
    (:class:`dtpvit.encoder.reducers.GridPooling`), or a number of tokens, have none to move.

    Args:
        model: The encoder; its reducers' rates of now are the targets.
        steps: Optimizer steps from keeping all to the target.
        delay: Optimizer steps before those, which keep all; both 0 leaves everything as it is.

    Raises:
        UserError: If there is nothing to move, or a number of steps below 0.
    """

    def __init__(self, model: nn.Module, steps: int, delay: int = 0) -> None:
        for name, value in (("compression_warmup", steps), ("compression_delay", delay)):
            if value < 0:
                raise UserError(f"{name} is {value}; expected a number of steps, at least 0")
        self.steps, self.delay = steps, delay
        self._pooling: list[tuple[BoundaryPooling, float]] = [
            (module, module.compression)
            for module in model.modules()
            if isinstance(module, BoundaryPooling) and not isinstance(module, GridPooling)
        ]
        self._selecting: list[tuple[TokenSelection, float]] = [
            (module, module.keep) for module in model.modules() if isinstance(module, TokenSelection)
        ]
        if (steps or delay) and not self._pooling and not self._selecting:
            raise UserError(
                f"compression_warmup is {steps}, compression_delay {delay}, and no reducer has a compression or a keep "
                "rate; leave both at 0"
            )

    def set(self, step: int) -> None:
        """Choose the rates of optimizer step ``step``, counted from 0."""
        if not self.steps and not self.delay:
            return
        past = step - self.delay
        progress = 0.0 if past < 0 else min(1.0, past / self.steps) if self.steps else 1.0
        for reducer, target in self._pooling:
            reducer.compression = 1 + (target - 1) * progress
        for reducer, target in self._selecting:
            reducer.keep = target + (1 - target) * 0.5 * (1 + math.cos(math.pi * progress))
