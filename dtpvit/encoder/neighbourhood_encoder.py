"""The Neighbourhood Attention Transformer, and the same with token merging between its levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from dtpvit.encoder.hierarchical import HierarchicalEncoder, StridedConvolution, Transition
from dtpvit.encoder.layers import Block, Mlp
from dtpvit.encoder.layout import BlockLayouts
from dtpvit.encoder.reducers.base import reseeded
from dtpvit.encoder.reducers.windowed_tome import WindowedToMe
from dtpvit.encoder.tokens import Tokens

__all__ = ["NeighbourhoodEncoder", "WindowMerging"]


class WindowMerging(Transition):
    """Merging by the keys of the level's last block, and an MLP to twice the width.

    The MLP half of the block keeps its residual around LayerNorm and MLP, on the merged tokens too: without it the loss
    explodes, as the author of windowed merging found.

    Args:
        dim: Width of the level.
        num_heads: Attention heads of the level.
        place: ``"inside"``: between the block's attention and its MLP; ``"after"``: behind the block.
        eps: Of the LayerNorm.
        **merging: Arguments of :class:`dtpvit.encoder.reducers.WindowedToMe`; as published, ``by_size`` and
            ``proportional`` are False.

    Raises:
        ValueError: If ``place`` is neither, or an argument out of range.
    """

    def __init__(
        self, dim: int, *, num_heads: int, eps: float, place: Literal["inside", "after"] = "inside", **merging: Any
    ) -> None:
        super().__init__()
        if place not in ("inside", "after"):
            raise ValueError(f"place is {place!r}; expected inside or after")
        self.dim, self.num_heads, self.place = dim, num_heads, place
        self.reducer = WindowedToMe(dim, **merging)
        if self.reducer.window == 1:
            raise ValueError("a window of 1 merges nothing; give an even one, or no merging for convolutions")
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.widen = Mlp(dim, 2 * dim, out=2 * dim)

    def forward(self, block: Block, tokens: Tokens) -> tuple[Tokens, BlockLayouts]:
        came = tokens.layout
        tokens, evidence = block.attend(tokens, self.reducer.needs)
        if self.place == "after":
            tokens = block.feed_forward(tokens)
        tokens = reseeded(self.reducer, self.reducer(tokens, evidence)).tokens
        seen = BlockLayouts.of(came, mlp=came if self.place == "after" else tokens.layout)
        if self.place == "inside":
            tokens = block.feed_forward(tokens)
        return tokens.with_features(self.widen(self.norm(tokens.features))), seen

    def macs(self, tokens: Tensor) -> Tensor:
        left = tokens / 4  # of a grid whose sides are even
        return self.reducer.patch_macs(tokens, self.dim, self.num_heads) + self.widen.macs(left)


class NeighbourhoodEncoder(HierarchicalEncoder):
    """ "NA localizes self attention to the nearest neighboring pixels", on four levels.

    Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; with ``dilations`` that of Hassani and Shi,
    "Dilated Neighborhood Attention Transformer", 2022. The defaults are NAT-Mini's.

    NATTEN's kernel takes no bias. Where it is installed it is used, on CUDA, by an encoder with ``position_bias=False``
    and with ``merging=None`` or ``proportional=False`` in it, on the levels whose grid is larger than the kernel.

    Args:
        image_size: Side of the images, or (height, width), in pixels, multiples of 4.
        dim: Width of the first level; every level has twice that of the one before.
        depths: Blocks of each level.
        num_heads: Attention heads of each level.
        kernel_size: Tokens that a token sees, down and across, odd; all of a shorter side.
        dilations: Steps between those, of each block of each level; None for 1 everywhere.
        mlp_ratio: Hidden width of the MLP over that of the level.
        merging: How tokens become fewer between levels, arguments of :class:`WindowMerging`; None for the strided
            convolutions of the paper.
        position_bias: Whether attention depends on where a token lies from the other.
        layer_scale: Initial factor on the residual branches, 0 for none.
        drop_path: Stochastic depth at the last block; it rises linearly from 0.
        readout: ``"mean"``.
        eps: Of every LayerNorm.
        in_channels: Colour channels.

    Raises:
        ValueError: If the lists differ in length, or sizes or the options of ``merging`` do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        merging: Mapping[str, Any] | None = None,
        position_bias: bool = True,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        readout: Literal["mean"] = "mean",
        eps: float = 1e-6,
        in_channels: int = 3,
    ) -> None:
        def transition(level: int, width: int, grid: tuple[int, int]) -> Transition:
            if merging is None:
                return StridedConvolution(width, eps=eps)
            return WindowMerging(width, num_heads=num_heads[level], eps=eps, **merging)

        super().__init__(
            transition=transition,
            image_size=image_size,
            dim=dim,
            depths=depths,
            num_heads=num_heads,
            kernel_size=kernel_size,
            dilations=dilations,
            mlp_ratio=mlp_ratio,
            position_bias=position_bias,
            layer_scale=layer_scale,
            drop_path=drop_path,
            readout=readout,
            eps=eps,
            in_channels=in_channels,
        )
