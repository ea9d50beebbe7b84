"""What all methods share that average tokens wherever they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.exportable import means_by_product
from dtpvit.encoder.ops.segments import Segments, pool_segments
from dtpvit.encoder.tokens import Tokens

__all__ = ["merge"]


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
