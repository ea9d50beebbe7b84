"""Decisions about boundaries: how many, which threshold, what a rate costs. All in float32 or wider."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.selection import rank_per_image

__all__ = [
    "band_loss",
    "batch_threshold",
    "binomial_loss",
    "imitation_loss",
    "ratio_loss",
    "straight_through",
    "top_per_image",
]


def straight_through(hard: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``hard`` in value, the gradient of sigmoid(logits / temperature); shape (T,)."""
    soft = torch.sigmoid(logits / temperature)
    return hard + (soft - soft.detach())


def batch_threshold(scores: Tensor, count: int) -> Tensor:
    """Threshold that ``count`` of the scores exceed, halfway to the next one, a float32 scalar.

    >>> batch_threshold(torch.tensor([0.0, 3.0, 1.0, 2.0]), 2)
    tensor(1.5000)
    """
    if count <= 0:
        return scores.new_full((), float("inf"))
    if count >= len(scores):
        return scores.new_full((), float("-inf"))
    ordered = scores.sort(descending=True).values
    return (ordered[count - 1] + ordered[count]) / 2


def top_per_image(scores: Tensor, opening: Tensor, layout: Layout, keep: Tensor) -> Tensor:
    """The ``keep`` highest scores of each image, ties to the earlier place; openings always count as highest.

    Args:
        scores: Shape (T,).
        opening: Places that are taken in any case and do not count among ``keep``, bool, shape (T,).
        layout: Of the T places.
        keep: Further places to take of each image, int64, shape (B,).

    Returns:
        Taken places, bool, shape (T,).
    """
    taken = rank_per_image(scores, opening, layout) < (keep + layout.num_prefix + 1)[layout.image]
    return taken | opening


def binomial_loss(counts: Tensor, lengths: Tensor, rate: float) -> Tensor:
    """Mean over images of -log Binomial(count; length, rate) / length.

    The prior of Nawrot et al. (ACL 2023) in closed form, so that a count that is a float sum needs no rounding.

    Args:
        counts: Boundaries of each image, differentiable, float32, shape (B,).
        lengths: Tokens of each image, shape (B,).
        rate: Prior probability of a boundary.
    """
    n = lengths.to(torch.float32)
    k = counts.clamp(min=0.0).minimum(n)
    combinations = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_rate = math.log(rate)
    log_rest = math.log1p(-rate) if rate < 1 else 0.0  # at rate 1 nothing is left over
    return -((combinations + k * log_rate + (n - k) * log_rest) / n).mean()


def ratio_loss(hard_rate: Tensor, mean_probability: Tensor, rate: float) -> Tensor:
    """N/(N-1) * ((N-1) F G + (1-F)(1-G)) with N = 1/rate; least, 1, at F = G = rate.

    Hwang, Wang and Gu, "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling" (H-Net), 2025. Over a batch, so
    that counts may vary from image to image.

    Args:
        hard_rate: F, share of boundaries; gets no gradient. Scalar.
        mean_probability: G, mean boundary probability. Scalar.
        rate: Target share.
    """
    f, g = hard_rate.detach(), mean_probability
    if rate >= 1:  # the formula's limit: whatever is not kept costs
        return 1 - g
    n = 1 / rate
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))


def band_loss(rates: Tensor, low: float, high: float) -> Tensor:
    """Mean hinge on each image's rate outside [low, high] (S-DRIP, Peng and Kumar 2025); ``rates`` of shape (B,)."""
    return (torch.relu(low - rates) + torch.relu(rates - high)).mean()


def imitation_loss(logits: Tensor, starts: Tensor, layout: Layout) -> Tensor:
    """Mean binary cross-entropy of the free places' logits with starts that somebody else found, a scalar.

    Args:
        logits: Shape (T,).
        starts: Zero or one, shape (T,).
        layout: Of the T places.
    """
    free = ~layout.opening
    loss = binary_cross_entropy_with_logits(logits, starts.to(logits.dtype), reduction="none")
    return loss.masked_fill(layout.opening, 0.0).sum() / free.sum().clamp(min=1)
