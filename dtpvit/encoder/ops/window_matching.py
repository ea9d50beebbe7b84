"""Which tokens of a small window of the grid are merged with which, every window on its own.

Shape letters: B images, N cells of the grid in raster order, W windows, P places of a window, M targets of a window, E
channels of the metric. Places that no cell of the grid fills, at the right and lower border, come last in their window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dtpvit.encoder.ops.scan import kept_table

__all__ = ["Windows", "match_targets", "places_by_noise", "places_by_part", "windows_of"]


class Windows(NamedTuple):
    """A grid cut into windows, and each window into 2 x 2 parts; partial ones at the right and lower border.

    Attributes:
        cell: Cell at each place, 0 where there is none, int64, (W, P).
        cells: How many places are filled, int64, (W,).
        part: Part that each place lies in, -1 where there is no cell, int64, (W, P).
        parts: How many parts there are, int64, (W,).
        coarse: Cell of the grid of parts, in raster order, of each part, 0 where there is none, int64, (W, M).
        place: Where each cell is among all places, int64, (N,).
    """

    cell: Tensor
    cells: Tensor
    part: Tensor
    parts: Tensor
    coarse: Tensor
    place: Tensor


@kept_table
def windows_of(rows: int, columns: int, window: int, device: torch.device | None = None) -> Windows:
    """Cut a grid into windows of ``window`` x ``window`` cells, an even number."""
    cell, part, coarse = list[list[int]](), list[list[int]](), list[list[int]]()
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            inside = [
                (row, column)
                for row in range(top, min(top + window, rows))
                for column in range(left, min(left + window, columns))
            ]
            coarser = [row // 2 * -(-columns // 2) + column // 2 for row, column in inside]
            known = sorted(set(coarser))
            coarse.append(known)
            part.append([known.index(number) for number in coarser])
            cell.append([row * columns + column for row, column in inside])
    cells, parts = (torch.tensor([len(members) for members in kind]) for kind in (cell, coarse))
    places, targets = window**2, window**2 // 4
    filled = [
        torch.tensor([members + [fill] * (width - len(members)) for members in kind])
        for kind, width, fill in ((cell, places, 0), (part, places, -1), (coarse, targets, 0))
    ]
    place = [0] * (rows * columns)
    for number, members in enumerate(cell):
        for slot, member in enumerate(members):
            place[member] = number * places + slot
    found = Windows(filled[0], cells, filled[1], parts, filled[2], torch.tensor(place))
    return Windows(*(table.to(device) for table in found))


def places_by_noise(noise: Tensor, filled: Tensor, wanted: Tensor, most: int) -> Tensor:
    """Targets at random: the filled places with the least noise, in ascending order.

    Args:
        noise: One draw of distinct numbers an image, shared by its windows, (B, 1, P).
        filled: Leading places that may be chosen, (W,).
        wanted: How many to choose, at most as many, (W,).
        most: The most of any window.

    Returns:
        (B, W, ``most``); behind those wanted, the number of places.
    """
    places = noise.shape[-1]
    free = torch.arange(places, device=noise.device) < filled[:, None]
    order = torch.where(free, noise, torch.inf).argsort(dim=-1)[..., :most]
    chosen = torch.arange(most, device=noise.device) < wanted[:, None]
    return torch.where(chosen, order, places).sort(dim=-1).values


def places_by_part(noise: Tensor, windows: Windows) -> Tensor:
    """One target a part, the place with the least noise: (B, 1, P) to (B, W, M)."""
    parts = torch.arange(windows.coarse.shape[1], device=noise.device)[:, None]
    mine = windows.part[:, None, :] == parts  # (W, M, P)
    best = torch.where(mine, noise[:, :, None, :], torch.inf).argmin(dim=-1)
    return torch.where(mine.any(-1), best, noise.shape[-1])


def match_targets(metric: Tensor, target: Tensor) -> Tensor:
    """Let every place that is no target go into the most similar target of its window.

    Args:
        metric: What similarity is the cosine of, (B, W, P, E).
        target: Places of the targets, ascending, the number of places where there is none, (B or 1, W, M).

    Returns:
        Number of the target that each place goes into, of a target its own, int64, (B, W, P).
    """
    batch, _, places, dim = metric.shape
    target = target.expand(batch, -1, -1)
    none = target == places
    metric = normalize(metric, dim=-1)
    wanted = target.masked_fill(none, 0)[..., None].expand(-1, -1, -1, dim)
    scores = metric @ metric.gather(2, wanted).transpose(2, 3)
    best = scores.masked_fill(none[:, :, None, :], -torch.inf).argmax(dim=-1)
    itself = target[:, :, None, :] == torch.arange(places, device=target.device)[:, None]
    return torch.where(itself.any(-1), itself.to(torch.int64).argmax(-1), best)
