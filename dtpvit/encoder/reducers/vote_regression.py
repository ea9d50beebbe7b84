"""Predict the votes instead of following them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtpvit.encoder.ops.collectives import gather_columns
from dtpvit.encoder.reducers.precision import FullPrecision

__all__ = ["VoteRegression"]


class _Regress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, logits: Tensor, free: Tensor, votes: VoteRegression) -> Tensor:
        ctx.save_for_backward(logits, free)
        ctx.votes = votes
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        logits, free = ctx.saved_tensors
        return None, ctx.votes.pull(logits, -grads[0], free).masked_fill(~free, 0.0), None, None


class VoteRegression(FullPrecision):
    """Gradient of boundary logits towards the standardised logarithm of each place's symmetric vote.

    Followed as a gradient, a vote that is always non-negative has no resting point: whatever votes above the mean is
    pushed up for ever and the logits end in two saturated lumps, between which the threshold of evaluation falls by
    chance. Regressed, a logit rests where it predicts its vote; logits then have a fixed mean and spread, so that
    nothing drifts, and the quantile threshold picks the places where the loss is expected to pull hardest. The targets'
    mean and spread are those of the step before, over all ranks and micro-batches, so that gradients are the same
    wherever a batch is cut. The very first step has none and follows the votes themselves.

    Args:
        spread: Standard deviation of the targets, against 1.8 of the training noise.
    """

    boundary_votes: Tensor

    def __init__(self, *, spread: float = 4.0) -> None:
        super().__init__()
        self.spread = spread
        self.register_buffer("boundary_votes", torch.zeros(3))  # mean vote; mean and deviation of its logarithm
        self._tally: Tensor | None = None

    def forward(self, hard: Tensor, logits: Tensor, free: Tensor) -> Tensor:
        """``hard`` in value; whatever vote arrives there teaches ``logits`` at ``free`` places. All of shape (T,)."""
        return _Regress.apply(hard, logits, free, self)

    def pull(self, logits: Tensor, votes: Tensor, free: Tensor) -> Tensor:
        """Gradient of the logits, in units of the mean vote, and an entry in this step's tally; shape (T,)."""
        mean, log_mean, log_deviation = self.boundary_votes.unbind()
        votes = votes.to(torch.float32)
        # A vote of zero says no more than one far below the mean; its logarithm would be all that counts.
        logarithm = torch.log(votes.clamp(min=(1e-3 * mean).clamp(min=1e-20)))
        mine = logarithm[free]
        entry = torch.stack((votes[free].sum(), mine.sum(), mine.square().sum(), free.sum().to(mine)))
        self._tally = entry if self._tally is None else self._tally + entry
        target = self.spread * (logarithm - log_mean) / log_deviation.clamp(min=1e-6)
        target = target.clamp(-2 * self.spread, 2 * self.spread)
        regress = mean * (logits - target.to(logits.dtype))
        return torch.where(mean > 0, regress, -votes.to(logits.dtype))

    @torch.no_grad()
    def settle(self) -> None:
        """Make the tally of the step that ended the statistics of the next, over all ranks; they call it together."""
        if self._tally is None:
            return
        total, logarithm, square, count = gather_columns(self._tally[:, None]).sum(1).unbind()
        self._tally = None
        mean = logarithm / count
        deviation = (square / count - mean.square()).clamp(min=0).sqrt()
        found = torch.stack((total / count, mean, deviation))
        self.boundary_votes.copy_(torch.where(found.isfinite().all(), found, self.boundary_votes))
