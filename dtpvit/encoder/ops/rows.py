"""Moving rows of a packed batch about, forward and backward as plain reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["take_rows"]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def take_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``rows[index]`` whose gradient is ``grad[inverse]``.

    The gradient of plain indexing is a scatter-add, atomic on CUDA and slow on both; where each row is wanted
    once (padding, unpadding, a permutation) it is only another read.

    Args:
        rows: Shape (T, ...).
        index: Row to read for each output row, shape (M,). Rows read again as padding must receive no gradient
            through those copies; they are ignored here.
        inverse: Output row that carries each input row's gradient, shape (T,).

    Returns:
        Shape (M, ...).
    """
    return _TakeRows.apply(rows, index, inverse)
