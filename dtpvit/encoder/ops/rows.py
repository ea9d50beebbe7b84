"""Moving rows of a packed batch about, forward and backward as plain reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["take_rows"]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unread: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, unread)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, unread = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        if unread is not None:
            grad.masked_fill_(unread.view(-1, *[1] * (grad.ndim - 1)), 0.0)
        return grad, None, None, None


def take_rows(rows: Tensor, index: Tensor, inverse: Tensor, *, unread: Tensor | None = None) -> Tensor:
    """``rows[index]`` whose gradient is ``grad[inverse]``.

    The gradient of plain indexing is a scatter-add, atomic on CUDA and slow on both; where each row is wanted
    once (padding, unpadding, a permutation) it is only another read.

    Args:
        rows: Shape (T, ...).
        index: Row to read for each output row, shape (M,). Rows read again as padding must receive no gradient
            through those copies; they are ignored here.
        inverse: Output row that carries each input row's gradient, shape (T,).
        unread: Input rows that no output row reads, whose gradient is zero whatever ``inverse`` says, bool, T elements.

    Returns:
        Shape (M, ...).
    """
    return _TakeRows.apply(rows, index, inverse, unread)
