"""What became of each patch of an image: the token that it went into, and how much a reducer made of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtpvit.encoder import Encoding, ImageEncoder, Tokens, VisionEncoder
from dtpvit.encoder.reducers import Reduction, TokenReducer
from dtpvit.evaluation.classifier import evaluating

__all__ = ["SeenSegments", "seen_segments"]


@dataclass(frozen=True)
class SeenSegments:
    """One image as the tokens behind its encoder's last reducer divide it.

    Attributes:
        source: Token of each patch, counted from 0 without class tokens (-1: dropped), int64, shape (rows, columns).
        tokens: How many there are; of soft methods some may be no patch's first.
        heat: What the first reducer that has any went by at each patch, float32, shape (rows, columns), NaN for patches
            that an earlier one dropped; None where no reducer has any.
        heat_of: What that is, in words; empty where there is none.
    """

    source: np.ndarray
    tokens: int
    heat: np.ndarray | None = None
    heat_of: str = ""

    @property
    def compression(self) -> float:
        """Patches for each token."""
        return self.source.size / max(1, self.tokens)


@torch.no_grad()
def seen_segments(trunk: ImageEncoder, images: Tensor) -> list[SeenSegments]:
    """Encode images in evaluation mode and look at what each reducer did; the trunk's mode stays what it was.

    Methods that restore their tokens behind a part of a block are shown by the tokens which that part saw.

    Args:
        trunk: The encoder.
        images: Normalised, on its device, shape (B, C, H, W).
    """
    with evaluating(trunk):
        if not isinstance(trunk, VisionEncoder) or not trunk.reducers:
            # timm's face of an encoder has another forward.
            encoding: Encoding = getattr(trunk, "encode", trunk)(images)
            return [_seen(part, trunk.grid_size) for part in encoding.tokens.split()]
        reductions = trunk.reductions(images)
    heat, heat_of = _first_heat(trunk, reductions)
    last = reductions[max(reductions)][1].tokens.split()
    heats = [None] * len(last) if heat is None else heat.float().cpu().numpy().reshape(len(last), *trunk.grid_size)
    return [_seen(part, trunk.grid_size, at, heat_of) for part, at in zip(last, heats, strict=True)]


def _first_heat(trunk: VisionEncoder, reductions: dict[int, tuple[Tokens, Reduction]]) -> tuple[Tensor | None, str]:
    """Of each patch, shape (P,), and what it is: of the first reducer, which still sees patches."""
    for block, (came, reduction) in sorted(reductions.items()):
        if reduction.heat is None:
            continue
        reducer = trunk.reducers[str(block)]
        assert isinstance(reducer, TokenReducer)
        spread = came.with_features(reduction.heat().float()[:, None]).unpool().squeeze(1)
        return spread.masked_fill(came.source < 0, float("nan")), reducer.heat_of
    return None, ""


def _seen(tokens: Tokens, grid: tuple[int, int], heat: np.ndarray | None = None, heat_of: str = "") -> SeenSegments:
    count = tokens.layout.total - tokens.num_prefix
    return SeenSegments(tokens.source.cpu().numpy().reshape(grid), count, heat, heat_of)
