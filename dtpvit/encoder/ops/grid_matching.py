"""Which tokens of a grid stay, one in each cell of it, and which of the others are merged with them.

Shape letters: B images, N tokens of a grid, C of them that stay, E channels of the metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.ops.exportable import descending_ranks
from dtpvit.encoder.ops.noise import advance_seed, uniform_noise

__all__ = ["grid_destinations", "match_to_destinations"]


def grid_destinations(
    grid: tuple[int, int], cell: tuple[int, int], device: torch.device, *, seed: Tensor | None = None
) -> Tensor:
    """One token of each whole cell: its first, or with ``seed`` a random one; none of cells cut by the border.

    Args:
        grid: Rows and columns of tokens.
        cell: Rows and columns of a cell.
        device: Where to.
        seed: One int64 an image, shape (B,).

    Returns:
        Raster places, int64, (1, C) or (B, C).

    >>> grid_destinations((4, 5), (2, 2), torch.device("cpu"))
    tensor([[ 0,  2, 10, 12]])
    """
    (rows, columns), (high, wide) = grid, cell
    top = torch.arange(rows // high, device=device)[:, None] * high
    left = torch.arange(columns // wide, device=device) * wide
    first = (top * columns + left).flatten()
    if seed is None:
        return first[None]
    # A seed for each cell, at a position that no token has: a product of computed positions overflows inductor.
    own = advance_seed(seed)[:, None] + first
    within = (uniform_noise(own, torch.full_like(first, -1)) * (high * wide)).to(torch.int64)
    return first + within // wide * columns + within % wide


def match_to_destinations(metric_BNE: Tensor, destinations_BC: Tensor, merges: int) -> Tensor:
    """Each token that does not stay proposes to the most similar one that does; the best proposals are accepted.

    Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023. Several may go into the same one.
    Equal scores go to the earlier one.

    Args:
        metric_BNE: What similarity is the inner product of: unit vectors, for the cosine.
        destinations_BC: Those that stay, for each image or, of shape (1, C), for all.
        merges: Proposals to accept, at most N - C.

    Returns:
        Place that each token goes into, itself where it stays, int64, (B, N).
    """
    batch, length, channels = metric_BNE.shape
    destinations = destinations_BC.expand(batch, -1)
    stays = torch.zeros(batch, length, dtype=torch.bool, device=metric_BNE.device).scatter(1, destinations, True)
    targets = metric_BNE.gather(1, destinations[:, :, None].expand(-1, -1, channels))
    best, partner = (metric_BNE @ targets.transpose(1, 2)).max(dim=2)
    accepted = descending_ranks(best.masked_fill(stays, float("-inf"))) < merges
    column = torch.arange(length, device=metric_BNE.device)
    return torch.where(accepted, destinations.gather(1, partner), column)
