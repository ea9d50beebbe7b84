"""Encoders of several levels, each of fewer and wider tokens than the one before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dtpvit.encoder.cost import ImageCost
from dtpvit.encoder.encoding import Encoding
from dtpvit.encoder.image_encoder import ImageEncoder
from dtpvit.encoder.layers import Block, NeighbourhoodAttention
from dtpvit.encoder.layout import BlockLayouts, Layout
from dtpvit.encoder.ops.segments import group_sums
from dtpvit.encoder.tokens import Tokens

__all__ = ["ConvStem", "HierarchicalEncoder", "Level", "StridedConvolution", "Transition", "coarser"]


class ConvStem(nn.Module):
    """Two overlapping 3 x 3 convolutions of stride 2 and a LayerNorm: images to a grid of tokens of 4 pixels each."""

    def __init__(self, dim: int, *, in_channels: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, dim // 2, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D)."""
        return self.norm(self.conv2(self.conv1(images)).flatten(2).transpose(1, 2))


class Transition(nn.Module, ABC):
    """The last block of a level and what leads to the next."""

    @abstractmethod
    def forward(self, block: Block, tokens: Tokens) -> tuple[Tokens, BlockLayouts]:
        """Tokens of the next level, of twice the width on a grid of half the side, and what the block's halves saw."""

    @abstractmethod
    def macs(self, tokens: Tensor) -> Tensor:
        """Multiply-accumulates, without the block's, on so many tokens of each image."""


def coarser(tokens: Tokens, features: Tensor) -> Tokens:
    """Tokens on the grid of half the side, each of which stands for the 2 x 2 that it lies on.

    Args:
        tokens: Of the finer grid, without prefix.
        features: Of the coarser, shape (T', D').
    """
    assert tokens.grid is not None
    (rows, columns), device = tokens.grid, features.device
    grid = -(-rows // 2), -(-columns // 2)
    layout = Layout.uniform_of(tokens.layout.batch, grid[0] * grid[1], 0, device)
    row, column = torch.arange(rows, device=device) // 2, torch.arange(columns, device=device) // 2
    cell = (row[:, None] * grid[1] + column).flatten()
    destination = (layout.first[:, None] + cell).flatten()
    size = group_sums(tokens.size, destination, layout.total)
    return tokens.regrouped(features, destination, layout, size, proportional=False).on_grid(grid)


class StridedConvolution(Transition):
    """A 3 x 3 convolution of stride 2 to twice the width, and a LayerNorm, as in NAT."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=eps)

    def forward(self, block: Block, tokens: Tokens) -> tuple[Tokens, BlockLayouts]:
        seen = BlockLayouts.of(tokens.layout)
        tokens = block(tokens)
        assert tokens.grid is not None
        x = self.conv(tokens.features.unflatten(0, (-1, *tokens.grid)).permute(0, 3, 1, 2))
        return coarser(tokens, self.norm(x.flatten(2).transpose(1, 2).flatten(0, 1))), seen

    def macs(self, tokens: Tensor) -> Tensor:
        return strided_convolution_macs(self.conv.in_channels, tokens)


def strided_convolution_macs(dim: int, tokens: Tensor) -> Tensor:
    """Of :class:`StridedConvolution` on so many tokens, if the sides of their grid are even."""
    return tokens / 4 * 9 * dim * 2 * dim


class Level(nn.Module):
    """Blocks of one width on one grid, and the way to the next level, if there is one."""

    def __init__(self, blocks: Sequence[Block], transition: Transition | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.transition = transition


class HierarchicalEncoder(ImageEncoder):
    """A convolutional stem, and levels of pre-norm blocks whose tokens attend to their neighbourhood on the grid.

    Tokens have no class token; the read-out is the mean, weighted by the patches that each stands for. A patch is 4
    pixels wide; its position is known from the offsets of its neighbours.

    Args:
        transition: What leads from a level to the next, made from its number, width and grid.
        image_size: Side of the images, or (height, width), in pixels, multiples of 4.
        dim: Width of the first level; every level has twice that of the one before.
        depths: Blocks of each level.
        num_heads: Attention heads of each level.
        kernel_size: Tokens that a token sees, down and across, odd; all of a shorter side.
        dilations: Steps between those, of each block of each level; None for 1 everywhere.
        mlp_ratio: Hidden width of the MLP over that of the level.
        position_bias: Whether attention depends on where a token lies from the other.
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
        transition: Callable[[int, int, tuple[int, int]], Transition],
        image_size: int | tuple[int, int],
        dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        kernel_size: int,
        dilations: Sequence[Sequence[int]] | None,
        mlp_ratio: float,
        position_bias: bool,
        layer_scale: float,
        drop_path: float,
        readout: Literal["mean"],
        eps: float,
        in_channels: int,
    ) -> None:
        last = len(depths) - 1
        super().__init__(
            image_size=image_size, patch_size=4, dim=dim * 2**last, readout=readout, in_channels=in_channels
        )
        steps = dilations or [[1] * depth for depth in depths]
        if list(map(len, steps)) != list(depths) or len(num_heads) != len(depths) or min(depths) < 1:
            raise ValueError(f"depths are {list(depths)}; expected a number of heads for each level, and a dilation")
        self.depths = tuple(depths)
        self.stem = ConvStem(dim, in_channels=in_channels, eps=eps)
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        levels, grid = list[Level](), self.grid_size
        for level, (heads, dilation) in enumerate(zip(num_heads, steps, strict=True)):
            width = dim * 2**level
            blocks = [
                Block(
                    width,
                    num_heads=heads,
                    mlp_ratio=mlp_ratio,
                    eps=eps,
                    drop_path=next(rates),
                    layer_scale=layer_scale,
                    attention=partial(
                        NeighbourhoodAttention,
                        grid=grid,
                        kernel_size=kernel_size,
                        dilation=step,
                        position_bias=position_bias,
                    ),
                )
                for step in dilation
            ]
            levels.append(Level(blocks, None if level == last else transition(level, width, grid)))
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
        self.levels = nn.ModuleList(levels)
        self.norm = nn.LayerNorm(self.dim, eps=eps)
        self.reducers = nn.ModuleDict()  # levels are the architecture's own
        self._init_weights()

    def _init_weights(self) -> None:
        for level in self.levels:
            assert isinstance(level, Level)
            for module in level.blocks.modules():
                if isinstance(module, nn.Linear):  # as in VisionEncoder
                    nn.init.trunc_normal_(module.weight, std=(3 * min(module.weight.shape)) ** -0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(
        self, images: Tensor, *, seeds: Tensor | None = None, thresholds: Mapping[int, Tensor] | None = None
    ) -> Encoding:
        seeds = self.checked_seeds(images, seeds)
        tokens = Tokens.from_dense(self.stem(images), grid=self.grid_size, seed=seeds)
        layouts: list[BlockLayouts] = []
        for level in self.levels:
            assert isinstance(level, Level)
            *inner, last = level.blocks
            for block in inner if level.transition is not None else level.blocks:
                layouts.append(BlockLayouts.of(tokens.layout))
                tokens = self._run(block, tokens)
            if level.transition is not None:
                tokens, seen = self._run(level.transition, last, tokens)
                layouts.append(seen)
        tokens = tokens.with_features(self.norm(tokens.features))
        return Encoding(tokens, self.read_out(tokens), layouts=tuple(layouts))

    def cost(self, layouts: tuple[BlockLayouts, ...]) -> ImageCost:
        start = torch.zeros_like(layouts[0].attention.lengths, dtype=torch.float64)
        full, reduced, transitions = start + self._stem_macs[1], start.clone(), start.clone()
        seen = iter(layouts)
        for number, level in enumerate(self.levels):
            assert isinstance(level, Level)
            came = start
            for block in level.blocks:
                assert isinstance(block, Block)
                saw = next(seen)
                came, left = (layout.lengths.to(torch.float64) for layout in (saw.attention, saw.mlp))
                shortened = saw.mlp.total != saw.attention.total
                (reduced if number else full).add_(block.attn.macs(came))
                (reduced if number or shortened else full).add_(block.mlp.macs(left))
            if level.transition is not None:
                transitions += level.transition.macs(came)
        return ImageCost(start + self._stem_macs[0], full, transitions, reduced, start)

    def dense_macs(self) -> float:
        """Multiply-accumulates of an image with strided convolutions between the levels."""
        total, (rows, columns) = float(sum(self._stem_macs)), self.grid_size
        width = self.stem.conv2.out_channels
        for level in self.levels:
            assert isinstance(level, Level)
            tokens = torch.tensor(rows * columns, dtype=torch.float64)
            for block in level.blocks:
                assert isinstance(block, Block)
                total += float(block.attn.macs(tokens) + block.mlp.macs(tokens))
            rows, columns = -(-rows // 2), -(-columns // 2)
            if level.transition is not None:
                total += float(strided_convolution_macs(width, torch.tensor(4.0 * rows * columns, dtype=torch.float64)))
                width *= 2
        return total

    @property
    def _stem_macs(self) -> tuple[int, int]:
        """Of the convolution that sees the pixels, and of the other."""
        cells = self.grid_size[0] * self.grid_size[1]
        return 4 * cells * self.stem.conv1.weight.numel(), cells * self.stem.conv2.weight.numel()
