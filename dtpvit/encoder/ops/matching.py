"""Which tokens of an image are merged with which, and in what order those left come.

Everything is said in cells: each image's tokens padded to the longest.
Shape letters: B images, N cells an image, E channels of the metric.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu, pad

from dtpvit.encoder.ops.exportable import descending_ranks

__all__ = ["best_proposals", "bipartite_matching", "energy_matching", "even_before_odd", "rows_after_merging"]


def best_proposals(metric_BNE: Tensor, frozen_BN: Tensor) -> tuple[Tensor, Tensor]:
    """What each even cell proposes: its most similar odd cell. Equal scores go to the earlier cell.

    Args:
        metric_BNE: What similarity is the inner product of: unit vectors, for the cosine.
        frozen_BN: Cells that neither propose nor are proposed to: protected tokens, padding.

    Returns:
        Similarity to it, -inf for odd cells and wherever there is none, (B, N); and the cell itself, int64, (B, N).
    """
    cells = metric_BNE.shape[1]
    if cells < 2:
        return metric_BNE.new_full(frozen_BN.shape, float("-inf")), frozen_BN.to(torch.int64)
    scores = metric_BNE[:, ::2] @ metric_BNE[:, 1::2].transpose(1, 2)
    scores = scores.masked_fill(frozen_BN[:, ::2, None] | frozen_BN[:, None, 1::2], float("-inf"))
    best, partner = scores.max(dim=2)
    # Even and odd cells in turn again: all even ones stand first here.
    column = torch.arange(cells, device=metric_BNE.device)
    turn = column // 2 + (column % 2) * best.shape[1]
    odd = cells - best.shape[1]
    return pad(best, (0, odd), value=float("-inf"))[:, turn], pad(2 * partner + 1, (0, odd))[:, turn]


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
    best, partner = best_proposals(metric_BNE, frozen_BN)
    accepted = descending_ranks(best) < merges_B[:, None]
    column = torch.arange(metric_BNE.shape[1], device=metric_BNE.device).expand_as(frozen_BN)
    return torch.where(accepted, partner, column)


def energy_matching(
    metric_BNE: Tensor, frozen_BN: Tensor, merges_B: Tensor, *, margin: float, among: int | None
) -> Tensor:
    """Matching in the order of energy, the mean of elu(cosine - margin) over the image: high in large, uniform areas.

    Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging" (PiToMe), NeurIPS 2024. Cells are
    brought into the order of falling energy, equal ones in the order they have, and matched as by
    :func:`bipartite_matching`: those at even places propose to those at odd places.

    Args:
        metric_BNE: Unit vectors.
        frozen_BN: As of :func:`bipartite_matching`.
        merges_B: Merges of each image, at most half the cells that are not frozen, int64.
        margin: Cosine from which two cells count as alike.
        among: Only the 2 * merges cells of highest energy take part, in each image, which is at most so many; the rest
            is protected. None: all cells take part.

    Returns:
        As of :func:`bipartite_matching`.
    """
    alike = elu(metric_BNE @ metric_BNE.transpose(1, 2) - margin).masked_fill(frozen_BN[:, None, :], 0.0)
    energy = alike.sum(2).masked_fill(frozen_BN, float("-inf"))  # the mean, times a number that an image has once
    rank = descending_ranks(energy)
    column = torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
    order = torch.zeros_like(rank).scatter(1, rank, column)
    ranked = order if among is None else order[:, :among]
    frozen = frozen_BN.gather(1, ranked)
    if among is not None:
        frozen = frozen | (column[:, :among] >= 2 * merges_B[:, None])
    metric = metric_BNE.gather(1, ranked[:, :, None].expand(-1, -1, metric_BNE.shape[2]))
    target = bipartite_matching(metric, frozen, merges_B)
    return column.scatter(1, ranked, ranked.gather(1, target))


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
