"""Energy-guided token merging: tokens of large uniform areas are merged, isolated ones are protected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtpvit.encoder.ops.matching import energy_matching
from dtpvit.encoder.reducers.merging import KeyMerging

__all__ = ["PiToMe"]


class PiToMe(KeyMerging):
    """ "PiToMe [...] prioritizes the preservation of informative tokens using [...] the energy score".

    Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024. Inside a block, the
    energy of a token is the mean of elu(cosine - margin) of its key with all keys of the image: high where many are
    alike. Of the 2r tokens of highest energy, every other one goes into the most similar of the rest of them, averaged
    by size; all other tokens are protected. Prefix tokens take no part.

    Meant for every block, ``{"0-11": {"class_path": "PiToMe", "init_args": {"r": 13}}}``. The published margin falls
    with depth, ``"each": {"margin": {"from": 0.9, "to": 0.075}}`` for twelve blocks; published too is a first half of
    blocks without protection, ``"each": {"protect": [false, ..., true, ...]}``. Unlike ToMe's, the tokens left keep
    their order: who meets whom follows from the energy alone.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        r: Tokens to lose, of every image; at most half of those that are no prefix are lost.
        ratio: In place of ``r``: share of the tokens to keep, at least 1/2; of N, floor(N - ratio * N) are lost.
        margin: Cosine from which two tokens count as alike.
        protect: Whether only the 2r tokens of highest energy take part; else all do, in the order of their energy, and
            the r most similar pairs are merged, as in ToMe.
        proportional: As of :class:`dtpvit.encoder.reducers.ToMe`.

    Raises:
        ValueError: If not exactly one of ``r`` and ``ratio`` is given, or one is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        r: int | None = None,
        ratio: float | None = None,
        margin: float = 0.5,
        protect: bool = True,
        proportional: bool = True,
    ) -> None:
        super().__init__(proportional=proportional)
        if (r is None) == (ratio is None):
            raise ValueError(f"r is {r} and ratio is {ratio}; expected one of them")
        if r is not None and (not isinstance(r, int) or r < 0):
            raise ValueError(f"r is {r!r}; expected a whole number of tokens, at least 0")
        if ratio is not None and not 0.5 <= ratio <= 1:
            raise ValueError(f"ratio is {ratio}; expected a share of the tokens to keep, from 0.5 to 1")
        self.r, self.ratio, self.margin, self.protect = r, ratio, margin, protect

    def extra_repr(self) -> str:
        rate = f"r={self.r}" if self.ratio is None else f"ratio={self.ratio}"
        return f"{rate}, margin={self.margin}, protect={self.protect}, proportional={self.proportional}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        if self.r == 0 or self.ratio == 1:
            return super().macs(tokens, dim, num_heads)
        # All cosines for the energies, then those between the two sides; behind one prefix token.
        even = self.lost_each(tokens - 1) if self.protect else (tokens / 2).ceil()
        odd = even if self.protect else tokens - even
        return (tokens**2 + even * odd) * (dim // num_heads)

    def lost(self, patches: int) -> int:
        wished = self.r if self.ratio is None else math.floor(patches - patches * self.ratio)
        assert wished is not None
        return min(wished, patches // 2)

    def lost_each(self, patches: Tensor) -> Tensor:
        half = patches // 2
        if self.ratio is None:
            return half.clamp(max=self.r)
        wide = patches.to(torch.float64)
        return torch.minimum((wide - wide * self.ratio).floor().to(half.dtype), half)

    def match(self, metric: Tensor, frozen: Tensor, merges: Tensor, most: int) -> Tensor:
        among = 2 * most if self.protect else None
        return energy_matching(metric, frozen, merges, margin=self.margin, among=among)
