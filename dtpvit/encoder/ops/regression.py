"""Predicting votes instead of following them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.segments import group_sums

__all__ = ["regress_votes", "vote_targets"]

# Two units of logit for each factor of e between votes: their logarithms spread by 1.4 to 1.9 within an image, so
# targets spread by about 3.5, against 1.8 of the training noise.
_GAIN = 2.0
_FLOOR = 1e-3  # a vote of zero says no more than one far below the mean, but its logarithm would be all that counts


def vote_targets(votes: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Where the logits of an image should be, given the votes of its free places.

    Args:
        votes: Non-negative, shape (T,).
        layout: Of the T places.

    Returns:
        Targets, the logarithm of each vote against its image's mean logarithm, times a gain, 0 at openings; and the
        mean vote of each place's image. Each float32 of shape (T,).
    """
    free = ~layout.opening
    votes = votes.to(torch.float32).masked_fill(layout.opening, 0.0)
    count = group_sums(free.to(torch.float32), layout.image, layout.batch).clamp(min=1)
    mean = (group_sums(votes, layout.image, layout.batch) / count)[layout.image]
    logarithm = torch.log((votes / mean.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=_FLOOR))
    logarithm = logarithm.masked_fill(layout.opening, 0.0)
    centre = (group_sums(logarithm, layout.image, layout.batch) / count)[layout.image]
    return (_GAIN * (logarithm - centre)).masked_fill(layout.opening, 0.0), mean


class _Regress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, logits: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.layout = layout
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (logits,) = ctx.saved_tensors
        layout: Layout = ctx.layout
        targets, mean = vote_targets(-grads[0], layout)
        grad = mean.to(logits.dtype) * (logits - targets.to(logits.dtype))
        return None, grad.masked_fill(layout.opening, 0.0), None


def regress_votes(hard: Tensor, logits: Tensor, layout: Layout) -> Tensor:
    """``hard`` in value; the symmetric votes that arrive there pull ``logits`` towards :func:`vote_targets`.

    Followed as a gradient, a vote that is never negative has no resting point: whatever votes above the rest is pushed
    up for ever, and the logits end in two saturated lumps with the threshold of evaluation between them by chance.
    Regressed, a logit rests where it predicts its vote against the others of its image, so nothing drifts, and the
    quantile threshold picks the places where the loss is expected to pull hardest. Within an image, since the level
    follows the loss of that example, which says nothing about where its boundaries belong. The gradient is in units of
    the image's mean vote: it scales with the loss, and is the same however a batch is cut.

    Args:
        hard: Zero or one, shape (T,).
        logits: Clean logits, shape (T,).
        layout: Of the T places.

    Returns:
        Shape (T,).
    """
    _ = layout.image, layout.opening  # kept in the layout from here on: a compiled backward pass may not write to it
    return _Regress.apply(hard, logits, layout)
