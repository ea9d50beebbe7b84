"""Soft assignment of the tokens of a grid to those of a coarser one.

An assignment is the Markov matrix A_up of SeNaTra: each token's shares in the groups, which sum to one. A local one is
kept as each token's shares in the 3 x 3 groups around the one it lies on.

Shape letters: B images, R x C fine cells, G = (R / stride) (C / stride) groups, S = stride^2 fine cells on each group,
in raster order, D channels. Fine cells outside the grid, where the stride does not divide its sides, have no share.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from dtpvit.encoder.ops.scan import kept_table

__all__ = ["around", "by_group", "cells_of", "groups_around", "local_matrix", "offsets_from", "sum_around"]


def by_group(fine: Tensor, stride: int) -> Tensor:
    """Cells by the group that they lie on, zeros outside the grid: (B, R, C, D) to (B, G, S, D)."""
    rows, columns = fine.shape[1:3]
    filled = pad(fine, (0, 0, 0, -columns % stride, 0, -rows % stride))
    cut = filled.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))  # (B, Y, stride, X, stride, D)
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def cells_of(grouped: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """The inverse of :func:`by_group`: (B, G, S, ...) to (B, R, C, ...)."""
    rows, columns = (-(-side // stride) for side in grid)
    cut = grouped.unflatten(2, (stride, stride)).unflatten(1, (rows, columns)).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]


def around(coarse: Tensor) -> Tensor:
    """The 3 x 3 groups around each, zeros beyond the border: (B, Y, X, D) to (B, G, 9, D)."""
    found = unfold(coarse.permute(0, 3, 1, 2), kernel_size=3, padding=1)  # (B, D 9, G)
    return found.unflatten(1, (-1, 9)).permute(0, 3, 2, 1)


def sum_around(shares: Tensor, rows: int, columns: int) -> Tensor:
    """Sums of what each group gets from those around it, the transpose of :func:`around`: (B, G, 9, D) to
    (B, G, D)."""
    found = fold(shares.permute(0, 3, 2, 1).flatten(1, 2), (rows, columns), kernel_size=3, padding=1)
    return found.flatten(2).transpose(1, 2)


@kept_table
def groups_around(rows: int, columns: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Which groups lie around each of a grid of ``rows`` x ``columns``, 0 beyond the border, and whether that is beyond
    it: int64 and bool, (G, 9)."""
    number = torch.arange(1.0, 1.0 + rows * columns, dtype=torch.float64).view(1, rows, columns, 1)
    found = around(number)[0, :, :, 0].to(torch.int64)
    return (found - 1).clamp(min=0).to(device), (found == 0).to(device)


@kept_table
def offsets_from(grid: tuple[int, int], stride: int, reach: int, device: torch.device | None = None) -> Tensor:
    """Where each group lies from each fine cell, in a table of (stride^2, (2 reach + 1)^2): int64, (R C, G).

    The first index is the cell's place on its own group; groups that lie further than ``reach`` count as at its end.
    """
    axes = []
    for side in grid:
        fine, coarse = torch.arange(side), torch.arange(-(-side // stride))
        away = (coarse - fine[:, None] // stride).clamp(-reach, reach) + reach
        axes.append((fine % stride, away))
    (down, rows), (across, columns) = axes
    place = (down[:, None] * stride + across).flatten()[:, None]
    wide = 2 * reach + 1
    offset = rows[:, None, :, None] * wide + columns[None, :, None, :]
    return (place * wide**2 + offset.reshape(len(place), -1)).to(device)


def local_matrix(shares: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Shares in the groups around as those in all groups: (B, G, S, 9) to (B, R C, G)."""
    rows, columns = (-(-side // stride) for side in grid)
    index, _ = groups_around(rows, columns, shares.device)  # beyond the border shares are zero
    empty = shares.new_zeros(*shares.shape[:3], rows * columns)
    dense = empty.scatter_add(3, index[None, :, None, :].expand_as(shares), shares)
    return cells_of(dense, grid, stride).flatten(1, 2)
