"""Ranking the tokens of each image, and sums over an image in which tokens count differently.

Shape letters: T tokens of all images, B images, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.exportable import descending_ranks
from dtpvit.encoder.ops.rows import take_rows

__all__ = ["rank_per_image", "weighted_sums"]


def rank_per_image(scores: Tensor, forced: Tensor, layout: Layout) -> Tensor:
    """Place of each token among those of its image: the forced ones as they stand, then by descending score.

    Args:
        scores: Shape (T,); ties go to the earlier token.
        forced: Tokens that come first whatever their score, bool, shape (T,).
        layout: Of the T tokens.

    Returns:
        int64, shape (T,).
    """
    masked = scores.masked_fill(forced, float("inf"))
    cells = masked[layout.padded].view(layout.batch, layout.longest).masked_fill(layout.padding, float("-inf"))
    return descending_ranks(cells).flatten()[layout.unpadded]


def weighted_sums(features: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """Sum of each image's tokens times their weights, without atomics.

    Args:
        features: Shape (T, D).
        weights: Shape (T,).
        layout: Of the T tokens.

    Returns:
        Shape (B, D), of the type of ``features``.
    """
    weights = weights.to(features.dtype)
    if not layout.uniform:
        features = take_rows(features, layout.padded, layout.unpadded)
        weights = take_rows(weights, layout.padded, layout.unpadded).masked_fill(layout.padding.flatten(), 0.0)
    cells = layout.batch, layout.longest
    with torch.autocast(features.device.type, enabled=False):
        return (weights.view(layout.batch, 1, layout.longest) @ features.unflatten(0, cells)).squeeze(1)
