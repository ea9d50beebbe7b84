"""Token downsampling of keys and values: every token asks, few are asked."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.rows import take_rows
from dtpvit.encoder.ops.segments import group_sums
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.merging import merge
from dtpvit.encoder.tokens import Tokens

__all__ = ["ToDo"]

METHODS = ("downsample", "max_pool", "avg_pool")


class ToDo(TokenReducer):
    """Keys and values from a downsampled grid; queries, residual and MLP are those of all tokens.

    Smith, Saxena and Saha, "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", IJCAI 2024.
    There for the attention of a diffusion model, without class token; here prefix tokens are always asked too. Worth
    most where attention is most of the cost, that is for many tokens. Nothing is learned, shapes are static, and fused
    attention stays usable.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        factor: Rows and columns of tokens for each row and column of keys; of a grid that it does not divide, rounded
            as in ``torch.nn.functional.interpolate(mode="nearest-exact")``.
        method: ``"downsample"``: the token in the middle of each cell; ``"avg_pool"``, ``"max_pool"``: the mean or the
            largest of each channel over the cell.
        proportional: Whether a key weighs as much as the patches of its cell, so that prefix tokens keep their share
            of the attention, as it does anyway where what comes is weighed; published: it does not.

    Raises:
        ValueError: If an argument is out of range, or the tokens form no grid any more.
    """

    place = "keys"
    needs_grid = True
    fixed = True

    def __init__(
        self,
        dim: int,
        *,
        factor: int = 2,
        method: Literal["downsample", "max_pool", "avg_pool"] = "downsample",
        proportional: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor is {factor!r}; expected a whole number, at least 1")
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
        self.factor, self.method, self.proportional = factor, method, proportional
        self.averages = method == "avg_pool"

    def extra_repr(self) -> str:
        return f"factor={self.factor}, method={self.method!r}, proportional={self.proportional}"

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if tokens.grid is None:
            raise ValueError(
                "keys on a coarser grid need tokens that form one; put them before reducers that leave none"
            )
        if self.factor == 1:
            return Reduction(tokens)
        layout, prefix = tokens.layout, tokens.num_prefix
        middle, cells = _coarser(tokens.grid, self.factor, layout.lengths.device)
        after = Layout.uniform_of(layout.batch, prefix + len(middle), prefix, layout.lengths.device)
        head = torch.arange(prefix, device=cells.device)
        destination = (after.first[:, None] + torch.cat((head, prefix + cells))).flatten()
        proportional = self.proportional or tokens.key_bias is not None
        if self.method == "avg_pool":
            return Reduction(merge(tokens, destination, after, proportional=proportional))
        x = tokens.features
        if self.method == "max_pool":
            index = destination[:, None].expand_as(x)
            features = x.new_zeros(after.total, x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)
        else:
            kept = (layout.first[:, None] + torch.cat((head, prefix + middle))).flatten()
            unread = kept[destination] != torch.arange(layout.total, device=kept.device)
            features = take_rows(x, kept, destination, unread=unread)
        size = group_sums(tokens.size, destination, after.total)
        return Reduction(tokens.regrouped(features, destination, after, size, proportional=proportional))


def _coarser(grid: tuple[int, int], factor: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster place in the middle of each cell of the coarser grid, shape (S,), and cell of each token, shape (N,)."""
    sides = [(fine, max(1, fine // factor)) for fine in grid]
    row, column = ((2 * torch.arange(few, device=device) + 1) * fine // (2 * few) for fine, few in sides)
    middle = row[:, None] * grid[1] + column
    row, column = (torch.arange(fine, device=device) * few // fine for fine, few in sides)
    return middle.flatten(), (row[:, None] * sides[1][1] + column).flatten()
