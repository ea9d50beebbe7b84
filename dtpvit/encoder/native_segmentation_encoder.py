"""The encoder whose levels are joined by grouping, so that its last tokens are segments of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.hierarchical import HierarchicalEncoder, Level, Transition
from dtpvit.encoder.layers import Block
from dtpvit.encoder.layout import BlockLayouts
from dtpvit.encoder.reducers.spatial_grouping import Grouping, SpatialGrouping
from dtpvit.encoder.tokens import Tokens

__all__ = ["GroupingTransition", "NativeSegmentationEncoder"]


class GroupingTransition(Transition):
    """Grouping into a quarter of the tokens, of twice the width, behind the last block of a level.

    Args:
        dim: Width of the level.
        scope: ``"local"`` or ``"dense"``.
        iterations: Rounds of grouping.
    """

    def __init__(self, dim: int, *, scope: Literal["local", "dense"], iterations: int) -> None:
        super().__init__()
        self.grouping = SpatialGrouping(dim, scope=scope, out_dim=2 * dim, iterations=iterations)

    def forward(self, block: Block, tokens: Tokens) -> tuple[Tokens, BlockLayouts]:
        seen = BlockLayouts.of(tokens.layout)
        return self.grouping(block(tokens), Evidence()).tokens, seen

    def grouped(self, block: Block, tokens: Tokens) -> tuple[Tokens, Grouping]:
        """As :meth:`forward`, and who went where."""
        tokens = block(tokens)
        found = self.grouping.group(tokens)
        return self.grouping.pooled(tokens, found), found

    def macs(self, tokens: Tensor) -> Tensor:
        return self.grouping.patch_macs(tokens)


class NativeSegmentationEncoder(HierarchicalEncoder):
    """A backbone "based on a content-aware spatial grouping layer" in place of uniform downsampling.

    Braso, Osep, Leal-Taixe, "Native Segmentation Vision Transformers", NeurIPS 2025: the levels are joined by local
    grouping, the last two by dense grouping. Blocks attend to their neighbourhood, as those of
    :class:`dtpvit.encoder.NeighbourhoodEncoder` do, not within Swin's shifted windows. The default size is that of the
    unofficial implementation.

    Args:
        image_size: Side of the images, or (height, width), in pixels, multiples of 4.
        dim: Width of the first level; every level has twice that of the one before.
        depths: Blocks of each level.
        num_heads: Attention heads of each level.
        kernel_size: Tokens that a token sees, down and across, odd; all of a shorter side.
        mlp_ratio: Hidden width of the MLP over that of the level.
        iterations: Rounds of each grouping.
        layer_scale: Initial factor on the residual branches, 0 for none.
        drop_path: Stochastic depth at the last block; it rises linearly from 0.
        readout: ``"mean"``.
        eps: Of every LayerNorm.
        in_channels: Colour channels.

    Raises:
        ValueError: If the lists differ in length, or sizes do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        kernel_size: int = 7,
        mlp_ratio: float = 3.0,
        iterations: int = 3,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        readout: Literal["mean"] = "mean",
        eps: float = 1e-6,
        in_channels: int = 3,
    ) -> None:
        def transition(level: int, width: int, grid: tuple[int, int]) -> Transition:
            scope = "dense" if level == len(depths) - 2 else "local"
            return GroupingTransition(width, scope=scope, iterations=iterations)

        super().__init__(
            transition=transition,
            image_size=image_size,
            dim=dim,
            depths=depths,
            num_heads=num_heads,
            kernel_size=kernel_size,
            dilations=None,
            mlp_ratio=mlp_ratio,
            position_bias=True,
            layer_scale=layer_scale,
            drop_path=drop_path,
            readout=readout,
            eps=eps,
            in_channels=in_channels,
        )

    @torch.no_grad()
    def masks(self, images: Tensor) -> Tensor:
        """Share of each patch in each token of the last level, the product over all groupings.

        Args:
            images: Normalised, shape (B, C, H, W).

        Returns:
            float32, shape (B, N, G), which sums to one over the tokens; its transpose spreads the tokens' features over
            the patches.
        """
        self.checked_seeds(images, None)
        tokens = Tokens.from_dense(self.stem(images), grid=self.grid_size)
        masks: Tensor | None = None
        for level in self.levels:
            assert isinstance(level, Level)
            if not isinstance(level.transition, GroupingTransition):
                break
            *inner, last = level.blocks
            for block in inner:
                tokens = block(tokens)
            assert isinstance(last, Block)
            tokens, found = level.transition.grouped(last, tokens)
            masks = found.matrix() if masks is None else masks @ found.matrix()
        assert masks is not None
        return masks
