"""Orders in which a grid of patches is read as one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["ORDERS", "first_of_cell", "kept_table", "scan_order", "window_order"]

ORDERS = ("raster", "serpentine", "hilbert")

P = ParamSpec("P")
R = TypeVar("R")


def kept_table(function: Callable[P, R]) -> Callable[P, R]:
    """Keep the results of the last calls; a constant to ``torch.compile``.

    Export traces with placeholders for tensors, which must not stay behind for the next eager call.
    """

    @lru_cache(maxsize=64)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):  # a table made in that mode could not serve training afterwards
            return function(*args, **kwargs)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (function if torch.compiler.is_exporting() else kept)(*args, **kwargs)

    return call


@kept_table
def scan_order(order: str, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Raster index of the patch at each place of the line, int64, shape (rows * columns,); kept for the next call.

    ``raster`` reads row by row, ``serpentine`` turns at the end of each row, ``hilbert`` follows a generalised
    Hilbert curve, so that a run of neighbours in the line is a compact region of the image.

    >>> scan_order("serpentine", 2, 3)
    tensor([0, 1, 2, 5, 4, 3])
    >>> scan_order("hilbert", 2, 2)
    tensor([0, 2, 3, 1])

    Raises:
        ValueError: If ``order`` is none of :data:`ORDERS`.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {', '.join(ORDERS)}")
    index = torch.arange(rows * columns).view(rows, columns)
    if order == "serpentine":
        index = torch.where(torch.arange(rows)[:, None] % 2 == 0, index, index.flip(1))
    if order != "hilbert":
        return index.flatten().to(device)
    walk: list[tuple[int, int]] = []
    if columns >= rows:
        _hilbert(walk, (0, 0), (0, columns), (rows, 0))
    else:
        _hilbert(walk, (0, 0), (rows, 0), (0, columns))
    return torch.tensor([row * columns + column for row, column in walk], device=device)


@kept_table
def first_of_cell(order: str, rows: int, columns: int, side: int, device: torch.device | None = None) -> Tensor:
    """The first on the line of the patches that share a square cell with each patch; cells are partial at the border.

    Returns:
        Raster indices, int64, shape (rows * columns,).

    >>> first_of_cell("raster", 2, 3, 2)
    tensor([0, 0, 2, 0, 0, 2])
    """
    line = scan_order(order, rows, columns)
    place = torch.empty_like(line).scatter_(0, line, torch.arange(len(line)))
    row, column = torch.arange(rows) // side, torch.arange(columns) // side
    cell = (row[:, None] * columns + column).flatten()
    first = torch.full_like(line, len(line)).scatter_reduce(0, cell, place, "amin")
    return line[first[cell]].to(device)


@kept_table
def window_order(rows: int, columns: int, window: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Order of a grid's patches by square windows, and which places begin a window.

    Returns:
        Raster index of the patch at each place, int64, and begins, bool, both of shape (rows * columns,); windows at
        the right and lower border may be partial.
    """
    wide = -(-columns // window)
    number = [row // window * wide + column // window for row in range(rows) for column in range(columns)]
    order = sorted(range(rows * columns), key=number.__getitem__)
    begins = [i == 0 or number[order[i]] != number[order[i - 1]] for i in range(rows * columns)]
    return torch.tensor(order, device=device), torch.tensor(begins, device=device)


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)


def _half(x: int) -> int:
    """Half of x, rounded down for either sign, as the recursion below needs it."""
    return x // 2


def _hilbert(walk: list[tuple[int, int]], at: tuple[int, int], a: tuple[int, int], b: tuple[int, int]) -> None:
    """Append the cells of the box spanned by ``a`` (the way to go) and ``b`` from corner ``at``.

    A Hilbert curve for boxes of any size: a box much longer than wide is cut in two along ``a``, any other into the
    three parts of the classical U, halves kept even where that avoids a diagonal step.
    """
    length, width = abs(a[0] + a[1]), abs(b[0] + b[1])
    step_a, step_b = (_sign(a[0]), _sign(a[1])), (_sign(b[0]), _sign(b[1]))
    if width == 1 or length == 1:
        step, count = (step_a, length) if width == 1 else (step_b, width)
        walk.extend((at[0] + step[0] * i, at[1] + step[1] * i) for i in range(count))
        return
    half_a, half_b = (_half(a[0]), _half(a[1])), (_half(b[0]), _half(b[1]))
    if 2 * length > 3 * width:
        if abs(half_a[0] + half_a[1]) % 2 and length > 2:
            half_a = (half_a[0] + step_a[0], half_a[1] + step_a[1])
        _hilbert(walk, at, half_a, b)
        _hilbert(walk, _add(at, half_a), _sub(a, half_a), b)
        return
    if abs(half_b[0] + half_b[1]) % 2 and width > 2:
        half_b = (half_b[0] + step_b[0], half_b[1] + step_b[1])
    _hilbert(walk, at, half_b, half_a)
    _hilbert(walk, _add(at, half_b), a, _sub(b, half_b))
    end = _add(at, _add(_sub(a, step_a), _sub(half_b, step_b)))
    _hilbert(walk, end, (-half_b[0], -half_b[1]), _sub(half_a, a))


def _add(x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int]:
    return x[0] + y[0], x[1] + y[1]


def _sub(x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int]:
    return x[0] - y[0], x[1] - y[1]
