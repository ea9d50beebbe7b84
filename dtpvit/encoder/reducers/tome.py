"""Token merging: in every block the most similar tokens are averaged, pair by pair."""

from __future__ import annotations

from torch import Tensor

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.matching import bipartite_matching, even_before_odd
from dtpvit.encoder.reducers.merging import KeyMerging

__all__ = ["ToMe"]


class ToMe(KeyMerging):
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

    def __init__(self, dim: int, *, r: int, proportional: bool = True) -> None:
        super().__init__(proportional=proportional)
        if not isinstance(r, int) or r < 0:
            raise ValueError(f"r is {r!r}; expected a whole number of tokens, at least 0")
        self.r = r

    def extra_repr(self) -> str:
        return f"r={self.r}, proportional={self.proportional}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        if not self.r:
            return super().macs(tokens, dim, num_heads)
        even = (tokens / 2).ceil()
        return even * (tokens - even) * (dim // num_heads)

    def lost(self, patches: int) -> int:
        return min(self.r, patches // 2)

    def lost_each(self, patches: Tensor) -> Tensor:
        return (patches // 2).clamp(max=self.r)

    def match(self, metric: Tensor, frozen: Tensor, merges: Tensor, most: int) -> Tensor:
        return bipartite_matching(metric, frozen, merges)

    def order(self, layout: Layout) -> Tensor:
        return even_before_odd(layout.longest, layout.num_prefix, layout.lengths.device)
