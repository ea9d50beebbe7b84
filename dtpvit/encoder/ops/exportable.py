"""What an exported program uses in place of operations that ONNX has not, or has only as a loop over segments.

Chosen where ``torch.compiler.is_exporting()``, where every image has as many tokens and segments as any other. Never
otherwise: both are quadratic in the tokens of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.ops.segments import Segments

__all__ = ["descending_ranks", "means_by_product", "ranks_by_counting"]


def means_by_product(features: Tensor, segments: Segments, images: int) -> Tensor:
    """:func:`dtpvit.encoder.ops.segments.pool_segments` as a product with each image's table of segments by tokens.

    Args:
        features: Shape (T, D), packed order.
        segments: A partition into as many segments for every image, all images having as many tokens.
        images: How many images those are.

    Returns:
        Shape (S, D).
    """
    line = features if segments.order is None else features.index_select(0, segments.order)
    count = segments.total.shape[0] // images
    first = torch.arange(images, device=features.device)[:, None] * count
    ids = segments.ids.view(images, -1) - first
    inside = ids[:, None, :] == torch.arange(count, device=features.device)[:, None]
    table = inside.to(features.dtype) * segments.size.view(images, 1, -1).to(features.dtype)
    total = (table @ line.view(images, -1, features.shape[1])).flatten(0, 1)
    return total / segments.total[:, None].to(features.dtype)


def descending_ranks(cells: Tensor) -> Tensor:
    """Place of each value in the descending order of its row, ties to the earlier column: (B, N) to int64 (B, N)."""
    if torch.compiler.is_exporting():
        return ranks_by_counting(cells)
    return cells.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def ranks_by_counting(cells: Tensor) -> Tensor:
    """:func:`descending_ranks` without sorting.

    >>> ranks_by_counting(torch.tensor([[1.0, 3.0, 1.0, 2.0]]))
    tensor([[2, 0, 3, 1]])
    """
    mine, other = cells[:, :, None], cells[:, None, :]
    column = torch.arange(cells.shape[1], device=cells.device)
    before = (other > mine) | ((other == mine) & (column < column[:, None]))
    return before.to(torch.int64).sum(2)
