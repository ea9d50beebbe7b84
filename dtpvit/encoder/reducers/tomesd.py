"""Token merging for the length of an attention: merged before it, unmerged behind it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.grid_matching import grid_destinations, match_to_destinations
from dtpvit.encoder.ops.matching import rows_after_merging
from dtpvit.encoder.ops.segments import spread_rows
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.merging import merge
from dtpvit.encoder.tokens import Tokens

__all__ = ["ToMeSD"]


class ToMeSD(TokenReducer):
    """Merges before attention and unmerges after it, x + unmerge(attention(merge(norm(x)))); every token lives on.

    Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023. One token of each cell of the
    grid stays; of the others, the ``ratio`` of all tokens whose cosine to one that stays is highest are averaged with
    it, and behind attention get a copy of what it found. Each block starts anew. Nothing is learned, no gradient flows
    through the matching, prefix tokens take no part.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        ratio: Tokens to merge away over all patch tokens; all but one of each cell are the most there are.
        cell: Rows and columns of a cell.
        random: Whether a random token of each cell stays, in evaluation too, as published; else its first.
        proportional: Whether attention weighs a merged token by the patches it stands for, as it does anyway where it
            weighed what comes; published: it does not.

    Raises:
        ValueError: If an argument is out of range, or the tokens form no grid any more.
    """

    place = "attention"
    needs_grid = True
    fixed = True

    def __init__(
        self,
        dim: int,
        *,
        ratio: float = 0.5,
        cell: tuple[int, int] = (2, 2),
        random: bool = False,
        proportional: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio is {ratio}; expected at least 0 and below 1")
        if len(cell) != 2 or min(cell) < 1:
            raise ValueError(f"cell is {cell}; expected rows and columns, at least 1")
        self.ratio, self.cell, self.proportional = ratio, (cell[0], cell[1]), proportional
        self.draws = "always" if random else "never"

    def extra_repr(self) -> str:
        random = self.draws == "always"
        return f"ratio={self.ratio}, cell={self.cell}, random={random}, proportional={self.proportional}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        patches = tokens - 1  # beside the class token
        return patches * (patches / (self.cell[0] * self.cell[1])).floor() * dim if self.ratio else patches * 0

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if tokens.grid is None:
            raise ValueError("merging on a grid needs tokens that form one; put it before reducers that leave none")
        if self.draws == "always" and tokens.seed is None:
            raise ValueError("random destinations need tokens.seed, from which those of each image follow")
        seed = tokens.seed if self.draws == "always" else None
        destinations = grid_destinations(tokens.grid, self.cell, tokens.features.device, seed=seed)
        layout, prefix = tokens.layout, tokens.num_prefix
        patches = layout.longest - prefix
        merges = min(int(patches * self.ratio), patches - destinations.shape[1])
        if not merges or not destinations.shape[1]:
            return Reduction(tokens)
        after = Layout.uniform_of(layout.batch, layout.longest - merges, prefix, layout.lengths.device)
        rows = _rows(tokens, destinations, merges)
        rows = torch.cat((layout.position.view(layout.batch, -1)[:, :prefix], rows + prefix), dim=1)
        destination = (after.first[:, None] + rows).flatten()
        proportional = self.proportional or tokens.key_bias is not None
        merged = merge(tokens, destination, after, proportional=proportional)
        return Reduction(merged, restore=lambda found: spread_rows(found, destination))


def _rows(tokens: Tokens, destinations: Tensor, merges: int) -> Tensor:
    """Row among those left that each patch token goes into, counted within its image without the prefix, (B, N)."""
    with torch.autocast(tokens.features.device.type, enabled=False):
        metric = normalize(tokens.features.detach().float(), dim=1)
        metric = metric.unflatten(0, (tokens.layout.batch, -1))[:, tokens.num_prefix :]
        target = match_to_destinations(metric, destinations, merges)
    column = torch.arange(target.shape[1], device=target.device)
    return rows_after_merging(target, torch.zeros_like(target, dtype=torch.bool), column)
