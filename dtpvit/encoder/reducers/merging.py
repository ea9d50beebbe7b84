"""What all methods share that average tokens wherever they lie."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.exportable import means_by_product
from dtpvit.encoder.ops.matching import rows_after_merging
from dtpvit.encoder.ops.segments import Segments, pool_segments
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.tokens import Tokens

__all__ = ["KeyMerging", "keys_in_cells", "merge", "packed_rows"]


class KeyMerging(TokenReducer):
    """Merges a number of tokens known beforehand, inside a block, by the cosine of its keys, averaged over heads.

    Nothing is learned, and no gradient flows through the matching; the averages pass it on. Subclasses say how many and
    which.

    Args:
        proportional: Size-proportional attention in later blocks: for supervised models as they are, and for whatever
            was trained with it; not for masked autoencoders as they are.
    """

    place = "inside"
    needs = frozenset({"keys"})
    fixed = True

    def __init__(self, *, proportional: bool) -> None:
        super().__init__()
        self.proportional = proportional

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        layout = tokens.layout
        most = self.lost(layout.longest - layout.num_prefix)
        if not most:
            return Reduction(tokens)
        assert evidence.keys is not None
        merges = self.lost_each(layout.lengths - layout.num_prefix)
        after = layout.resized(layout.lengths - merges, lambda length: length - self.lost(length - layout.num_prefix))
        with torch.autocast(evidence.keys.device.type, enabled=False):
            target = self.match(*keys_in_cells(evidence.keys, layout), merges, most)
        rows = packed_rows(target, layout, self.order(layout)) + after.first[layout.image]
        return Reduction(merge(tokens, rows, after, proportional=self.proportional))

    @abstractmethod
    def lost(self, patches: int) -> int:
        """Tokens that an image of so many that are no prefix loses, at most half of them."""

    @abstractmethod
    def lost_each(self, patches: Tensor) -> Tensor:
        """:meth:`lost` of each image, on its device, int64, shape (B,)."""

    @abstractmethod
    def match(self, metric: Tensor, frozen: Tensor, merges: Tensor, most: int) -> Tensor:
        """Cell that each cell goes into, as of :func:`dtpvit.encoder.ops.matching.bipartite_matching`.

        Args:
            metric: Unit vectors, shape (B, N, E).
            frozen: Cells that take no part, bool, shape (B, N).
            merges: Of each image, shape (B,).
            most: The most of any image.
        """

    def order(self, layout: Layout) -> Tensor:
        """Cells in the order in which those that stay come, shape (N,)."""
        return torch.arange(layout.longest, device=layout.lengths.device)


def keys_in_cells(keys: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Packed keys (T, E) as unit vectors in the cells of each image, (B, N, E); and which cells are prefix or padding.

    The second is bool, of shape (B, N).
    """
    cells = layout.batch, layout.longest
    frozen = layout.padding | (torch.arange(layout.longest, device=keys.device) < layout.num_prefix)
    return normalize(keys.detach(), dim=1)[layout.padded].unflatten(0, cells), frozen


def packed_rows(target: Tensor, layout: Layout, order: Tensor) -> Tensor:
    """Row within its image that each token goes into, shape (T,).

    Args:
        target: Cell that each cell goes into, shape (B, N).
        layout: Of the tokens before.
        order: Cells in the order in which those that stay come, shape (N,).
    """
    return rows_after_merging(target, layout.padding, order).flatten()[layout.unpadded]


def merge(tokens: Tokens, destination: Tensor, layout: Layout, *, proportional: bool) -> Tokens:
    """Average the tokens that go to the same row, by size.

    Args:
        tokens: What to merge.
        destination: Packed row that each token goes to, int64, shape (T,); every row has at least one.
        layout: Of the rows.
        proportional: Whether later blocks weigh a token by the patches it stands for.
    """
    groups = Segments.gathered(destination, layout.total, tokens.size)
    if torch.compiler.is_exporting():
        features = means_by_product(tokens.features, groups, layout.batch)
    else:
        features = pool_segments(tokens.features, torch.zeros_like(tokens.size), groups)
    return tokens.regrouped(features, destination, layout, groups.total, proportional=proportional)
