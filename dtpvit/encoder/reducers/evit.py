"""EViT and Top-K: inside a block, the tokens that the class token attends to most are kept."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.noise import uniform_noise
from dtpvit.encoder.reducers.base import Reduction
from dtpvit.encoder.reducers.selection import TokenSelection, select
from dtpvit.encoder.tokens import Tokens

__all__ = ["EViT", "TopK"]

Score = Literal["attention", "norm", "random"]


class EViT(TokenSelection):
    """ "We reorganize image tokens by preserving attentive image tokens and fusing inattentive ones".

    Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (EViT),
    ICLR 2022. Between a block's attention and its MLP, the ceil(keep * N) of N tokens are kept, in descending order,
    that the class token attends to most, averaged over heads; the others become one token, their sum weighted by that
    attention, not renormalised, which counts among the N of later reducers. The sum carries the gradient to the
    attention; the choice has none.

    The sum is one token among the others, as published: no mean of its patches, which ``source`` still names, it has
    size 1, so that neither attention in proportion to sizes nor a mean, of later reducers or of the read-out, gives it
    the weight of those that went into it.

    Meant for a few blocks, ``{"3,6,9": {"class_path": "EViT", "init_args": {"keep": 0.7}}}``.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        keep: Share of the tokens to keep, in (0, 1]; at 1 nothing changes.

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    place = "inside"
    needs = frozenset({"class_attention"})
    drops = True
    averages = False
    heat_of = "class attention"

    def __init__(self, dim: int, *, keep: float) -> None:
        super().__init__(keep)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if self.keep == 1:
            return Reduction(tokens)
        assert evidence.class_attention is not None
        wanted, after = _shortened(tokens.layout, self.keep, fuse=True)
        attention = evidence.class_attention
        return Reduction(select(tokens, attention, wanted, after, fuse=attention), heat=attention.detach)


class TopK(TokenSelection):
    """EViT without the fused token, and what it has to beat: other tokens, equally many.

    Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCV Workshops 2023,
    found it hard to beat. Patches that are not kept are lost.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        keep: Share of the tokens to keep, in (0, 1], of N tokens ceil(keep * N).
        score: Which ones: those that the class token gives the most ``"attention"``; those of the greatest L2
            ``"norm"``; or ``"random"`` ones, as PatchDropout has it (Liu et al., "PatchDropout: Economizing Vision
            Transformers Using Patch Dropout", WACV 2023), which follow from each image's seed.

    Raises:
        ValueError: If an argument is out of range.
    """

    place = "inside"
    drops = True

    def __init__(self, dim: int, *, keep: float, score: Score = "attention") -> None:
        super().__init__(keep)
        if score not in get_args(Score):
            raise ValueError(f"score is {score!r}; expected one of {', '.join(get_args(Score))}")
        self.score: Score = score
        self.needs = frozenset({"class_attention"} if score == "attention" else ())
        self.draws = "always" if score == "random" else "never"
        self.heat_of = {"attention": "class attention", "norm": "norm of the token", "random": "random score"}[score]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score={self.score!r}"

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        return tokens * dim if self.score == "norm" else super().macs(tokens, dim, num_heads)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if self.keep == 1:
            return Reduction(tokens)
        wanted, after = _shortened(tokens.layout, self.keep, fuse=False)
        scores = self._scores(tokens, evidence)
        return Reduction(select(tokens, scores, wanted, after), heat=scores.detach)

    def _scores(self, tokens: Tokens, evidence: Evidence) -> Tensor:
        if self.score == "attention":
            assert evidence.class_attention is not None
            return evidence.class_attention
        if self.score == "norm":
            wide = torch.promote_types(tokens.features.dtype, torch.float32)
            return torch.linalg.vector_norm(tokens.features.detach(), dim=1, dtype=wide)
        if tokens.seed is None:
            raise ValueError("random tokens need tokens.seed, from which those of each image follow")
        return uniform_noise(tokens.seed[tokens.layout.image], tokens.layout.position)


def _shortened(layout: Layout, keep: float, *, fuse: bool) -> tuple[Tensor, Layout]:
    """Tokens to keep of each image, prefix not counted, shape (B,), and the layout of what is then left."""
    prefix = layout.num_prefix
    patches = layout.lengths - prefix
    wanted = (patches.to(torch.float64) * keep).ceil().to(torch.int64)

    def resize(length: int) -> int:
        kept = math.ceil((length - prefix) * keep)
        return prefix + kept + int(fuse and kept < length - prefix)

    lengths = wanted + prefix + (wanted < patches) if fuse else wanted + prefix
    return wanted, layout.resized(lengths, resize)
