"""Keeps a gradient that all boundary logits share from moving them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtpvit.encoder.ops.collectives import gather_columns
from dtpvit.encoder.reducers.precision import FullPrecision

__all__ = ["GradientBaseline"]


class _Subtract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, free: Tensor, baseline: Tensor, tally: Tensor) -> Tensor:
        ctx.save_for_backward(free, baseline.clone())
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor]:
        free, baseline = ctx.saved_tensors
        grad = grads[0].masked_fill(~free, 0.0)
        entry = torch.stack((grad.sum().to(torch.float32), free.sum().to(torch.float32)))
        return (grad - baseline).masked_fill(~free, 0.0), None, None, entry


class GradientBaseline(FullPrecision):
    """Subtracts, from the gradient of each free logit, the mean gradient of the step before.

    Where the threshold is a quantile of the logits it moves with them, so a push that they all get (every symmetric
    vote asks for a boundary) changes no decision; left in, the logits drift without end and the stored threshold of
    evaluation is always behind: seen, 99% of patches kept after 200 steps. The mean of the step before, over all ranks
    and micro-batches, is the same number wherever a batch is cut, so that gradients stay those of the joined batch.
    """

    boundary_baseline: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("boundary_baseline", torch.zeros(()))
        # Sum and count of this step's gradients arrive as the gradient of this tensor: autograd adds up micro-batches,
        # and a compiled step needs no side effect. No parameter, since no optimizer may touch it.
        self.tally = torch.zeros(2, requires_grad=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GradientBaseline:
        super()._apply(fn, recurse)
        self.tally = torch.zeros(2, device=self.boundary_baseline.device, requires_grad=True)
        return self

    def forward(self, scores: Tensor, free: Tensor) -> Tensor:
        """``scores``, whose gradient will be taken down by the baseline at ``free`` places; both of shape (T,)."""
        return _Subtract.apply(scores, free, self.boundary_baseline, self.tally)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the tally of the step that ended the baseline of the next, over all ranks; they call it together."""
        if self.tally.grad is None:
            return
        tally = gather_columns(self.tally.grad[:, None]).sum(1)
        self.tally.grad = None
        mean = tally[0] / tally[1].clamp(min=1)
        self.boundary_baseline.copy_(torch.where(mean.isfinite(), mean, self.boundary_baseline))
