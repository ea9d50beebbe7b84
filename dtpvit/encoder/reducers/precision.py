"""Modules whose arithmetic must not lose digits when the model around them is cast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["FullPrecision"]


class FullPrecision(nn.Module):
    """A module whose parameters and buffers stay at float32 or wider when a model is cast to half precision.

    open_clip casts whole towers; 8 bits of mantissa cannot hold a threshold that a rate of 1/10 hangs on.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecision:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep, recurse)
        return self
