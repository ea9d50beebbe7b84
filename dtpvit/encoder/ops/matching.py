"""Which tokens of an image are merged with which, and in what order those left come.

Everything is said in cells: each image's tokens padded to the longest.
Shape letters: B images, N cells an image, E channels of the metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.ops.exportable import descending_ranks

__all__ = ["bipartite_matching", "even_before_odd", "rows_after_merging"]


def bipartite_matching(metric_BNE: Tensor, frozen_BN: Tensor, merges_B: Tensor) -> Tensor:
    """Bipartite soft matching: each even cell proposes to its best odd cell, the best proposals are accepted.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023. Several may go into the same cell. Equal scores go to
    the earlier cell.

    Args:
        metric_BNE: What similarity is the inner product of: unit vectors, for the cosine.
        frozen_BN: Cells that neither go nor are gone into: protected tokens, padding.
        merges_B: Proposals to accept, at most half the cells that are not frozen, int64.

    Returns:
        Cell that each cell goes into, itself where it stays, int64, (B, N).
    """
    column = torch.arange(metric_BNE.shape[1], device=metric_BNE.device).expand_as(frozen_BN)
    even, odd = column[:, ::2], column[:, 1::2]
    scores = metric_BNE[:, ::2] @ metric_BNE[:, 1::2].transpose(1, 2)
    scores = scores.masked_fill(frozen_BN[:, ::2, None] | frozen_BN[:, None, 1::2], float("-inf"))
    best, partner = scores.max(dim=2)
    accepted = descending_ranks(best) < merges_B[:, None]
    goes = torch.where(accepted, odd.gather(1, partner), even)
    # Even and odd cells in turn again: all even ones stand first here.
    turn = column[0] // 2 + (column[0] % 2) * even.shape[1]
    return torch.cat((goes, odd), dim=1)[:, turn]


def even_before_odd(cells: int, num_prefix: int, device: torch.device) -> Tensor:
    """The prefix, then the even cells, then the odd ones, so that who was matched before meets others; shape (N,)."""
    column = torch.arange(cells, device=device)
    first = num_prefix + num_prefix % 2
    return torch.cat((column[:num_prefix], column[first::2], column[2 * num_prefix + 1 - first :: 2]))


def rows_after_merging(target_BN: Tensor, empty_BN: Tensor, order_N: Tensor) -> Tensor:
    """Row of the token that each cell is part of after a merge, counted within its image.

    Args:
        target_BN: As of :func:`bipartite_matching`.
        empty_BN: Padding.
        order_N: Cells in the order in which those that stay are to come.

    Returns:
        int64, (B, N).

    >>> target, full = torch.tensor([[0, 1, 1, 3]]), torch.zeros(1, 4, dtype=torch.bool)
    >>> rows_after_merging(target, full, torch.tensor([0, 2, 3, 1]))
    tensor([[0, 2, 2, 1]])
    """
    column = torch.arange(target_BN.shape[1], device=target_BN.device)
    stays = (target_BN == column) & ~empty_BN
    rows = stays[:, order_N].to(torch.int64).cumsum(1) - 1
    place = torch.zeros_like(order_N).scatter(0, order_N, column)
    return rows[:, place].gather(1, target_BN)
