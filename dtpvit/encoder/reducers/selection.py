"""What all methods share that keep some tokens of an image and let the others go."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.rows import take_rows
from dtpvit.encoder.ops.selection import rank_per_image, weighted_sums
from dtpvit.encoder.reducers.base import TokenReducer
from dtpvit.encoder.tokens import Tokens

__all__ = ["TokenSelection", "select"]


class TokenSelection(TokenReducer):
    """Keeps the tokens of the highest scores; subclasses say what scores them.

    Args:
        keep: Share to keep, in (0, 1].

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    fixed = True

    def __init__(self, keep: float) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; expected a share of the tokens, more than 0 and at most 1")
        self.keep = keep

    def extra_repr(self) -> str:
        return f"keep={self.keep:.6g}"


def select(tokens: Tokens, scores: Tensor, wanted: Tensor, after: Layout, *, fuse: Tensor | None = None) -> Tokens:
    """Keep the prefix and the tokens of the highest scores, in descending order, ties to the earlier one.

    Args:
        tokens: What to choose from.
        scores: Shape (T,); they get no gradient.
        wanted: Tokens to keep of each image, beside its prefix, int64, shape (B,).
        after: Layout of what is left, which the caller knows on the host.
        fuse: Weight of each token in one more token of its image, the sum of those not kept, behind the others, shape
            (T,), which counts as one patch, whatever went into it; without it they are dropped.
    """
    layout = tokens.layout
    kept = wanted + layout.num_prefix
    limit = kept[layout.image]
    rank = rank_per_image(scores.detach(), layout.prefix, layout)
    gone = rank >= limit
    row = after.first[layout.image] + torch.minimum(rank, limit)  # of those that are gone, the row of their sum
    # Whatever has no row of its own goes into one behind the last, which is cut off.
    slot = row.masked_fill(gone, after.total)
    token = torch.arange(layout.total, device=row.device)
    index = slot.new_zeros(after.total + 1).scatter_(0, slot, token)[: after.total]
    features = take_rows(tokens.features, index, row.clamp(max=after.total - 1), unread=gone)
    destination, size, bias = row, tokens.size[index], None if tokens.key_bias is None else tokens.key_bias[index]
    if fuse is None:
        destination = row.masked_fill(gone, -1)
    else:
        fused = after.position == kept[after.image]
        sums = weighted_sums(tokens.features, fuse.masked_fill(~gone, 0.0), layout)
        features = torch.where(fused[:, None], sums[after.image], features)
        size, bias = size.masked_fill(fused, 1.0), None if bias is None else bias.masked_fill(fused, 0.0)
    left = tokens.regrouped(features, destination, after, size, proportional=False)
    return replace(left, key_bias=bias)
