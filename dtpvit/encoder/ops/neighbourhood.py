"""Neighbourhood attention: every token of a grid attends to the square of tokens around it.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, and, with dilation, Hassani and Shi, "Dilated
Neighborhood Attention Transformer", 2022. At the borders the square is shifted inwards, so that every query has equally
many keys.

Gathering each query's keys would copy every key once a query, and multiply by matrices of one row. So queries that lie
together are worked through together, a tile at a time, with the union of their keys and a mask.

Shape letters: B images, N cells of the grid in raster order, H heads, E channels a head, X tiles, Q queries and K keys
of a tile, T = B N.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dtpvit.encoder.ops.attention import fold_if_rounded
from dtpvit.encoder.ops.scan import kept_table

__all__ = ["neighbourhood_attention", "neighbours"]

_TILE = 7  # side of a tile: a larger one copies fewer keys and masks more of the logits

Pair = tuple[int, int]


def neighbours(side: int, kernel: int, dilation: int) -> list[list[int]]:
    """Places that each place of one axis sees, ascending.

    >>> neighbours(5, 3, 1)
    [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    >>> neighbours(6, 3, 2)[1]
    [1, 3, 5]

    Raises:
        ValueError: If the side is shorter than ``kernel`` steps of ``dilation``.
    """
    if kernel * dilation > side:
        raise ValueError(f"{kernel} neighbours at dilation {dilation} do not fit into a side of {side} tokens")
    found = []
    for place in range(side):
        alike = range(place % dilation, side, dilation)
        first = min(max(place // dilation - kernel // 2, 0), len(alike) - kernel)
        found.append([alike[first + step] for step in range(kernel)])
    return found


def neighbourhood_attention(
    qkv_T3HE: Tensor,
    grid: Pair,
    kernel: Pair,
    dilation: Pair = (1, 1),
    *,
    position_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each cell to its neighbourhood.

    NATTEN's kernel is used on CUDA where it is installed and there is no bias, which it does not take.

    Args:
        qkv_T3HE: Queries, keys and values of equally many cells of every image, shape (T, 3, H, E).
        grid: Rows and columns.
        kernel: Keys down and across.
        dilation: Steps between them.
        position_bias: Added to the logits by offset of the key, shape (H, 2 kernel - 1, 2 kernel - 1).
        key_bias: Added to the logits of each key, float32, shape (T,); it gets no gradient.

    Returns:
        Shape (T, H, E).
    """
    everything, dim = kernel == grid, qkv_T3HE.shape[-1]
    if qkv_T3HE.is_cuda and position_bias is None and key_bias is None and not everything and (fast := _natten()):
        q, k, v = qkv_T3HE.unflatten(0, (-1, *grid)).unbind(3)
        return fast.na2d(q, k, v, kernel_size=kernel, dilation=dilation).flatten(0, 2)
    qkv_T3HE, key_bias = fold_if_rounded(qkv_T3HE, key_bias)
    tiles = _tiles(grid, kernel, dilation, max(grid) if everything else _TILE, qkv_T3HE.device)
    q, k, v = qkv_T3HE.unflatten(0, (-1, grid[0] * grid[1])).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, E)
    bias = _bias(tiles, position_bias, key_bias)
    if bias is not None:
        bias = bias.to(q.dtype).expand(-1, q.shape[1], -1, -1, -1).flatten(1, 2)
    if everything:  # one tile, in raster order
        found = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=dim**-0.5)
        return found.transpose(1, 2).flatten(0, 1)[..., :dim]
    q = q.index_select(2, tiles.query.flatten()).unflatten(2, tiles.query.shape).flatten(1, 2)  # (B, H X, Q, E)
    k, v = (x.index_select(2, tiles.key.flatten()).unflatten(2, tiles.key.shape).flatten(1, 2) for x in (k, v))
    found = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=dim**-0.5)
    found = found.unflatten(1, (-1, tiles.query.shape[0])).flatten(2, 3).index_select(2, tiles.place)
    return found.transpose(1, 2).flatten(0, 1)[..., :dim]


class _Tiles(NamedTuple):
    """Cells of a grid, tile by tile; smaller tiles are filled up.

    Attributes:
        query: Cell of each query, int64, (X, Q).
        key: Cell of each key, int64, (X, K).
        outside: Whether a key is none of the query's, bool, (X, Q, K).
        offset: Where the key lies from the query, in a flattened (2 kernel - 1) x (2 kernel - 1) table, int64,
            (X, Q, K).
        place: Where each cell is among the queries, int64, (N,).
        full: Whether no key is outside.
    """

    query: Tensor
    key: Tensor
    outside: Tensor
    offset: Tensor
    place: Tensor
    full: bool


@kept_table
def _tiles(grid: Pair, kernel: Pair, dilation: Pair, tile: int, device: torch.device | None) -> _Tiles:
    rows, columns = (_axis_tiles(*axis, tile) for axis in zip(grid, kernel, dilation, strict=True))
    (across_query, across_key, across), (down_query, down_key, down) = columns, rows
    count = down.shape[0] * across.shape[0]
    query = (down_query[:, None, :, None] * grid[1] + across_query[:, None, :]).reshape(count, -1)
    key = (down_key[:, None, :, None] * grid[1] + across_key[:, None, :]).reshape(count, -1)
    down, across = down[:, None, :, None, :, None], across[:, None, :, None, :]
    shape = count, query.shape[1], key.shape[1]
    outside = ((down < 0) | (across < 0)).reshape(shape)
    offset = (down.clamp(min=0) * (2 * kernel[1] - 1) + across.clamp(min=0)).reshape(shape)
    place = torch.empty(grid[0] * grid[1], dtype=torch.int64).scatter_(0, query.flatten(), torch.arange(query.numel()))
    query, key, hidden, offset, place = (table.to(device) for table in (query, key, outside, offset, place))
    return _Tiles(query, key, hidden, offset, place, full=not bool(outside.any()))


def _axis_tiles(side: int, kernel: int, dilation: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of one axis: places of queries, (X, Q), and of keys, (X, K), and where the key lies from the query in a
    table of 2 kernel - 1 offsets, -1 where it is none of the query's, (X, Q, K)."""
    near = neighbours(side, kernel, dilation)
    alike = [list(range(first, side, dilation)) for first in range(dilation)]
    queries = [places[start : start + tile] for places in alike for start in range(0, len(places), tile)]
    keys = [sorted({key for query in tile_of for key in near[query]}) for tile_of in queries]
    most = [max(map(len, cells)) for cells in (queries, keys)]
    away = torch.full((len(queries), *most), -1)
    for number, (tile_of, seen) in enumerate(zip(queries, keys, strict=True)):
        for row, query in enumerate(tile_of):
            for key in near[query]:
                away[number, row, seen.index(key)] = (key - query) // dilation + kernel - 1
        away[number, len(tile_of) :] = away[number, len(tile_of) - 1]
    filled = [
        torch.tensor([cells + cells[-1:] * (width - len(cells)) for cells in kind])
        for kind, width in zip((queries, keys), most, strict=True)
    ]
    return filled[0], filled[1], away


def _bias(tiles: _Tiles, position_bias: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
    """What is added to the logits, (1 or B, 1 or H, X, Q, K); None for nothing."""
    bias = None if position_bias is None else position_bias.flatten(1)[:, tiles.offset][None]
    if key_bias is not None:
        of_keys = key_bias.view(-1, 1, tiles.place.shape[0])[:, :, tiles.key][:, :, :, None]
        bias = of_keys if bias is None else bias + of_keys
    if tiles.full:
        return bias
    bias = torch.zeros(1, 1, 1, 1, 1, device=tiles.outside.device) if bias is None else bias
    return bias.masked_fill(tiles.outside, float("-inf"))


@cache
def _natten() -> ModuleType | None:
    try:  # by name: torch is all that this package asks for
        return import_module("natten.functional")
    except ImportError:
        return None
