"""The same encoder with its batch padded to the longest image: what packing is measured against.

Every block works on (B, longest, D), padding included, as implementations of pooled Transformers usually do; only
attention is told which keys are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dtpvit.encoder import VisionEncoder, VisualTower
from dtpvit.encoder.layers import Block
from dtpvit.encoder.tokens import Tokens

__all__ = ["PaddedTower"]


class PaddedTower(nn.Module):
    """A tower of ours, its weights shared, on padded batches behind the first reducer.

    Args:
        tower: With one reducer, which acts before its block.
    """

    def __init__(self, tower: VisualTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to features (B, embed_dim)."""
        trunk: VisionEncoder = self.tower.trunk
        (before,) = map(int, trunk.reducers)
        tokens = trunk.embed(images)
        for index in range(before):
            tokens = trunk.blocks[index](tokens)
        x, mask = _pad(trunk.enter_block(before, tokens).tokens)
        for block in trunk.blocks[before:]:
            assert isinstance(block, Block)
            x = _block(block, x, mask)
        return self.tower.head(trunk.norm(x)[:, 0])


def _pad(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Features (B, longest, D) and the mask on keys, size-proportional as the encoder's own, (B, 1, 1, longest)."""
    layout = tokens.layout
    features = tokens.features[layout.padded].view(layout.batch, layout.longest, -1)
    bias = torch.zeros(layout.total, device=tokens.features.device) if tokens.key_bias is None else tokens.key_bias
    mask = bias[layout.padded].view(layout.batch, layout.longest).masked_fill(layout.padding, float("-inf"))
    return features, mask[:, None, None, :].to(features.dtype)


def _block(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = scaled_dot_product_attention(*qkv.unbind(0), attn_mask=mask.to(qkv.dtype).expand(-1, -1, x.shape[1], -1))
    x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))
