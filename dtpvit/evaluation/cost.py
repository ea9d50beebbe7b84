"""Multiply-accumulates from the token counts that each block really saw, never by tracing.

GMACs are multiply-accumulates / 1e9; two FLOPs each. Additions, norms, activations and softmax are left out, as is
customary. A block on n tokens of width D with MLP ratio r costs n (4 + 2 r) D^2 + 2 n^2 D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtpvit.encoder import Encoding, Layout, VisionEncoder
from dtpvit.encoder.layers import Block
from dtpvit.encoder.reducers import TokenReducer

__all__ = ["ImageCost", "dense_macs", "image_cost", "image_macs"]


@dataclass(frozen=True)
class ImageCost:
    """MACs of each image by part, each float64 of shape (B,).

    Attributes:
        patch_embed: Patch projection.
        blocks: All Transformer blocks.
        reducers: Boundary predictors and the like.
        projection: Into the space shared with text, or to the classes.
    """

    patch_embed: Tensor
    blocks: Tensor
    reducers: Tensor
    projection: Tensor

    @property
    def total(self) -> Tensor:
        return self.patch_embed + self.blocks + self.reducers + self.projection


def _block_macs(block: Block, tokens: Tensor) -> Tensor:
    dim, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
    return tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * tokens**2 * dim


def image_cost(trunk: VisionEncoder, layouts: tuple[Layout, ...], embed_dim: int = 0) -> ImageCost:
    """Cost of each image of a batch.

    Args:
        trunk: The encoder.
        layouts: What each block saw, from :class:`dtpvit.encoder.Encoding`.
        embed_dim: Outputs of the projection behind the encoder, 0 for none.
    """
    first = layouts[0].lengths.to(torch.float64)
    patches = trunk.grid_size[0] * trunk.grid_size[1]
    patch = trunk.patch_embed.proj.weight.numel() * patches
    blocks, reducers = torch.zeros_like(first), torch.zeros_like(first)
    before = torch.full_like(first, patches + 1)
    for index, (block, layout) in enumerate(zip(trunk.blocks, layouts, strict=True)):
        lengths = layout.lengths.to(torch.float64)
        key = str(index)
        if key in trunk.reducers:
            reducer = trunk.reducers[key]
            assert isinstance(reducer, TokenReducer)
            reducers += reducer.macs(before, trunk.dim)
        assert isinstance(block, Block)
        blocks += _block_macs(block, lengths)
        before = lengths
    return ImageCost(torch.full_like(first, patch), blocks, reducers, torch.full_like(first, trunk.dim * embed_dim))


def image_macs(trunk: VisionEncoder, encoding: Encoding, embed_dim: int = 0) -> Tensor:
    """MACs of each image, all parts together, float64, shape (B,)."""
    return image_cost(trunk, encoding.layouts, embed_dim).total


def dense_macs(trunk: VisionEncoder, embed_dim: int = 0) -> float:
    """MACs of an image if no token were reduced."""
    tokens = torch.tensor([trunk.grid_size[0] * trunk.grid_size[1] + 1.0], dtype=torch.float64)
    total = trunk.patch_embed.proj.weight.numel() * (tokens - 1) + trunk.dim * embed_dim
    for block in trunk.blocks:
        assert isinstance(block, Block)
        total = total + _block_macs(block, tokens)
    return float(total)
