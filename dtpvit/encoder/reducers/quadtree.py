"""Patches of several sizes: where the image has little to tell, a larger square becomes one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layers import Mlp
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.entropy import CELLS
from dtpvit.encoder.ops.scan import ORDERS, first_of_cell, scan_order
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.merging import merge, packed_rows
from dtpvit.encoder.tokens import Tokens

__all__ = ["Quadtree"]


class Quadtree(TokenReducer):
    """Cells of 4 x 4, else of 2 x 2 patches whose pixels have little entropy become one token each, before any block.

    In the manner of Adaptive Patch Transformers (Choudhury et al., "Accelerating Vision Transformers with Adaptive
    Patch Sizes", ICLR 2026). A cell's token is the mean of its patches' embeddings, positions included, plus an MLP of
    that mean whose last layer starts at zero, so that pretrained weights see means at first and training can do better.
    Only whole cells of the grid are merged. How many tokens are left is the image's affair: thresholds, not a rate, say
    what little entropy is.

    Args:
        dim: Width D of the tokens.
        thresholds: Bits below which a cell of 2 x 2 and one of 4 x 4 patches is merged.
        order: Of the tokens left, by the first of their patches: ``"raster"``, ``"serpentine"`` or ``"hilbert"``.
        proportional: Size-proportional attention afterwards.

    Raises:
        ValueError: If there are not two thresholds or the order is unknown; in the forward pass, if the tokens form no
            grid any more.
    """

    needs = frozenset({"pixel_entropy"})
    needs_grid = True
    averages = False
    heat_of = "entropy of the pixels, bits"
    holds_rate = False

    def __init__(
        self,
        dim: int,
        *,
        thresholds: Sequence[float] = (5.5, 4.0),
        order: str = "hilbert",
        proportional: bool = True,
    ) -> None:
        super().__init__()
        if len(thresholds) != len(CELLS) - 1:
            raise ValueError(f"{len(thresholds)} thresholds are given; expected two, for cells of 2x2 and 4x4 patches")
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; expected one of {', '.join(ORDERS)}")
        self.thresholds, self.order, self.proportional = tuple(thresholds), order, proportional
        self.mlp = Mlp(dim, dim)
        nn.init.zeros_(self.mlp.fc2.weight)
        nn.init.zeros_(self.mlp.fc2.bias)

    def extra_repr(self) -> str:
        return f"thresholds={self.thresholds}, order={self.order!r}, proportional={self.proportional}"

    def output_macs(self, tokens: Tensor, dim: int) -> Tensor:
        return 2 * tokens * dim**2

    @property
    def counts_patches(self) -> bool:
        return True

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        changed = tokens.layout.total - tokens.layout.batch * tokens.num_prefix != tokens.patches.total
        if tokens.grid is None or tokens.pixel_entropy is None or changed:
            raise ValueError("a quadtree needs tokens that form a grid; put it before every other reducer")
        layout = tokens.layout
        target = self._target(tokens.pixel_entropy.unflatten(0, (layout.batch, -1)), tokens.grid) + layout.num_prefix
        column = torch.arange(layout.longest, device=target.device)
        target = torch.cat((column[: layout.num_prefix].expand(layout.batch, -1), target), dim=1)
        after = Layout.fetched((target == column).sum(1), layout.num_prefix)  # the one synchronisation
        line = scan_order(self.order, *tokens.grid, target.device) + layout.num_prefix
        rows = packed_rows(target, layout, torch.cat((column[: layout.num_prefix], line)))
        merged = merge(tokens, rows + after.first[layout.image], after, proportional=self.proportional)
        # Run on every row: to pick those of cells would synchronise once more.
        more = self.mlp(merged.features).to(merged.features.dtype)
        whole = torch.where((merged.size > 1)[:, None], merged.features + more, merged.features)
        heat = partial(tokens.patch_mean, tokens.pixel_entropy[:, 0])
        return Reduction(replace(merged, features=whole), heat=heat)

    def _target(self, entropy: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch that stands for each patch's cell: entropies (B, N, 3) to raster indices (B, N)."""
        patches = torch.arange(entropy.shape[1], device=entropy.device)
        target = patches.expand(len(entropy), -1)
        for column, (side, threshold) in enumerate(zip(CELLS[1:], self.thresholds, strict=True), start=1):
            first = first_of_cell(self.order, *grid, side, entropy.device)
            target = torch.where(entropy[:, :, column] < threshold, first, target)  # larger cells come last and win
        return target
