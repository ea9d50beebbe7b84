"""Token merging: in every block the most similar tokens are averaged, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.matching import bipartite_matching, even_before_odd, rows_after_merging
from dtpvit.encoder.reducers.base import Reduction, TokenReducer
from dtpvit.encoder.reducers.merging import merge
from dtpvit.encoder.tokens import Tokens

__all__ = ["ToMe"]


class ToMe(TokenReducer):
    """ "ToMe gradually combines similar tokens in a transformer using a general and light-weight matching algorithm".

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023. Inside a block, the cosine of the keys, averaged over
    heads, says how alike two tokens are; each token at an even place proposes to the most similar one at an odd place,
    and the ``r`` most similar pairs are averaged by size. Prefix tokens take no part. Nothing is learned, and no
    gradient flows through the matching; the averages pass it on.

    Meant for every block, ``{"0-11": {"class_path": "ToMe", "init_args": {"r": 13}}}``; the published decreasing
    schedule is ``"each": {"r": {"from": 26, "to": 0}}``.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        r: Tokens to lose, of every image; at most half of those that are no prefix are lost.
        proportional: Size-proportional attention in later blocks: for supervised models as they are, and for whatever
            was trained with it; not for masked autoencoders as they are.

    Raises:
        ValueError: If ``r`` is no whole number from 0 on.
    """

    place = "inside"
    needs = frozenset({"keys"})
    fixed = True

    def __init__(self, dim: int, *, r: int, proportional: bool = True) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 0:
            raise ValueError(f"r is {r!r}; expected a whole number of tokens, at least 0")
        self.r, self.proportional = r, proportional

    def extra_repr(self) -> str:
        return f"r={self.r}, proportional={self.proportional}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        if not self.r:
            return super().macs(tokens, dim, num_heads)
        even = (tokens / 2).ceil()
        return even * (tokens - even) * (dim // num_heads)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        layout = tokens.layout
        if not self._lost(layout, layout.longest):
            return Reduction(tokens)
        assert evidence.keys is not None
        merges = ((layout.lengths - layout.num_prefix) // 2).clamp(max=self.r)
        after = layout.resized(layout.lengths - merges, lambda length: length - self._lost(layout, length))
        destination = _match(evidence.keys.detach(), layout, merges) + after.first[layout.image]
        return Reduction(merge(tokens, destination, after, proportional=self.proportional))

    def _lost(self, layout: Layout, length: int) -> int:
        """Tokens that a sequence of ``length`` tokens loses."""
        return min(self.r, (length - layout.num_prefix) // 2)


def _match(keys: Tensor, layout: Layout, merges: Tensor) -> Tensor:
    """Row within its image that each token goes into, shape (T,)."""
    cells = layout.batch, layout.longest
    frozen = layout.padding | (torch.arange(layout.longest, device=keys.device) < layout.num_prefix)
    with torch.autocast(keys.device.type, enabled=False):
        metric = normalize(keys, dim=1)[layout.padded].unflatten(0, cells)
        target = bipartite_matching(metric, frozen, merges)
    order = even_before_odd(layout.longest, layout.num_prefix, keys.device)
    return rows_after_merging(target, layout.padding, order).flatten()[layout.unpadded]
