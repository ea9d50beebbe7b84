"""Controls: what a method has to beat before its decisions mean anything."""

from __future__ import annotations

from typing import Literal

import torch

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.ops.boundaries import top_per_image
from dtpvit.encoder.ops.noise import uniform_noise
from dtpvit.encoder.ops.scan import window_order
from dtpvit.encoder.reducers.base import Reduction
from dtpvit.encoder.reducers.boundary_pooling import BoundaryPooling, place_in_batch
from dtpvit.encoder.tokens import Tokens

__all__ = ["FixedStride", "GridPooling", "RandomBoundaries"]

Order = Literal["raster", "serpentine", "hilbert"]


class FixedStride(BoundaryPooling):
    """Segments of equal length, to within one token: ceil(N / compression) of them in every image.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        compression: Tokens in for each token out.
        order: ``"raster"``, ``"serpentine"`` or ``"hilbert"``.
        proportional: Size-proportional attention after pooling.
    """

    fixed = True

    def __init__(self, dim: int, *, compression: float, order: Order = "raster", proportional: bool = True) -> None:
        super().__init__(compression, order=order, proportional=proportional)

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        layout = tokens.layout
        wanted, most = self.segments_wanted(layout)
        place = (layout.position - layout.num_prefix).clamp(min=0)
        patches = (layout.lengths - layout.num_prefix)[layout.image]
        count = wanted[layout.image]
        # floor(i * K / N) changes exactly K - 1 times
        changes = (place * count) // patches != ((place - 1) * count) // patches
        starts = (changes | layout.opening).to(torch.float32)
        return Reduction(self.pool(tokens, starts, self.line(tokens), fixed=most if layout.uniform else None))


class RandomBoundaries(BoundaryPooling):
    """Boundaries at random, as many as the rate asks for: the control that learned boundaries must beat.

    An image's boundaries follow from its seed alone: in evaluation a checksum of its pixels, in training drawn anew.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        compression: Tokens in for each token out.
        budget: ``"dynamic"``: each place is a boundary with equal probability, counts vary; ``"fixed"``: exactly
            ceil(N / compression) segments.
        order: ``"raster"``, ``"serpentine"`` or ``"hilbert"``.
        proportional: Size-proportional attention after pooling.
    """

    draws = "always"

    def __init__(
        self,
        dim: int,
        *,
        compression: float,
        budget: Literal["dynamic", "fixed"] = "dynamic",
        order: Order = "raster",
        proportional: bool = True,
    ) -> None:
        super().__init__(compression, order=order, proportional=proportional)
        if budget not in ("dynamic", "fixed"):
            raise ValueError(f"budget is {budget!r}; expected dynamic or fixed")
        self.fixed = budget == "fixed"

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if tokens.seed is None:
            raise ValueError("random boundaries need tokens.seed, from which those of each image follow")
        layout = tokens.layout
        noise = uniform_noise(tokens.seed[layout.image], layout.position)
        wanted, most = self.segments_wanted(layout)
        if self.fixed:
            starts = top_per_image(noise, layout.opening, layout, wanted - 1)
        else:
            patches = (layout.lengths - layout.num_prefix).to(torch.float64)
            share = (patches / self.compression - 1) / (patches - 1).clamp(min=1)
            starts = (noise < share[layout.image]) | layout.opening
        fixed = most if self.fixed and layout.uniform else None
        return Reduction(self.pool(tokens, starts.to(torch.float32), self.line(tokens), fixed=fixed))


class GridPooling(BoundaryPooling):
    """Average pooling over windows of the grid ("structural downsampling"); partial windows at the border.

    The tokens still form a grid afterwards, so that it can be applied again.

    Args:
        dim: Width of the tokens; unused, so that every reducer is made alike.
        window: Side of the square window, in tokens.
        proportional: Size-proportional attention after pooling.

    Raises:
        ValueError: If the tokens form no grid any more.
    """

    needs_grid = True
    fixed = True

    def __init__(self, dim: int, *, window: int = 2, proportional: bool = True) -> None:
        super().__init__(window**2, proportional=proportional)
        self.window = window

    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        if tokens.grid is None:
            raise ValueError("grid pooling needs tokens that form a grid; put it before every other reducer")
        rows, columns = tokens.grid
        wide, high = -(-columns // self.window), -(-rows // self.window)
        order, begins = window_order(rows, columns, self.window, tokens.features.device)
        layout = tokens.layout
        starts = torch.nn.functional.pad(begins.to(torch.float32), (layout.num_prefix, 0), value=1.0)
        starts = starts.repeat(layout.batch)
        pooled = self.pool(tokens, starts, place_in_batch(order, layout), fixed=wide * high)
        return Reduction(pooled.on_grid((high, wide)))
