"""Multiply-accumulates from the token counts that each block really saw, never by tracing.

GMACs are multiply-accumulates / 1e9; two FLOPs each. Additions, norms, activations and softmax are left out, as is
customary. On n tokens of width D the attention half of a block costs 4 n D^2 + 2 n^2 D, and where the n ask m others
2 (n + m) D^2 + 2 n m D; its MLP half 2 r n D^2 with MLP ratio r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dtpvit.encoder import BlockLayouts, Encoding, VisionEncoder
from dtpvit.encoder.layers import Block
from dtpvit.encoder.reducers import TokenReducer
from dtpvit.encoder.text import TextTower

__all__ = ["ImageCost", "counted_macs", "dense_macs", "image_cost", "image_macs", "text_macs"]


@dataclass(frozen=True)
class ImageCost:
    """MACs of each image by part, each float64 of shape (B,).

    Attributes:
        patch_embed: Patch projection.
        full_blocks: Transformer blocks, or halves of them, before the first reducer.
        reducers: Boundary predictors and the like, and the evidence they go by.
        reduced_blocks: Transformer blocks, or halves of them, behind the first reducer.
        projection: Into the space shared with text, or to the classes.
    """

    patch_embed: Tensor
    full_blocks: Tensor
    reducers: Tensor
    reduced_blocks: Tensor
    projection: Tensor

    @property
    def total(self) -> Tensor:
        return self.patch_embed + self.full_blocks + self.reducers + self.reduced_blocks + self.projection

    @property
    def training(self) -> Tensor:
        """Forward and backward: thrice the forward pass, but pixels need no gradient."""
        return 3 * self.total - self.patch_embed


def _attention_macs(dim: int, tokens: Tensor, keys: Tensor) -> Tensor:
    return 2 * (tokens + keys) * dim * dim + 2 * tokens * keys * dim


def _mlp_macs(dim: int, hidden: int, tokens: Tensor) -> Tensor:
    return 2 * tokens * dim * hidden


def _reducer_macs(reducer: TokenReducer, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
    """Of the decision, and of the evidence for it: keys are there anyway, the class token's row is one more product."""
    evidence = tokens * dim if "class_attention" in reducer.needs else torch.zeros_like(tokens)
    return reducer.macs(tokens, dim, num_heads) + evidence


def image_cost(trunk: VisionEncoder, layouts: tuple[BlockLayouts, ...], embed_dim: int = 0) -> ImageCost:
    """Cost of each image of a batch.

    Args:
        trunk: The encoder.
        layouts: What the parts of each block saw, from :class:`dtpvit.encoder.Encoding`.
        embed_dim: Outputs of the projection behind the encoder, 0 for none.
    """
    start = layouts[0].arrived.lengths.to(torch.float64)
    patches = trunk.grid_size[0] * trunk.grid_size[1]
    patch = trunk.patch_embed.proj.weight.numel() * patches
    full, reduced, reducers = (torch.zeros_like(start) for _ in range(3))
    shortened = False
    for index, (block, seen) in enumerate(zip(trunk.blocks, layouts, strict=True)):
        assert isinstance(block, Block)
        asking, asked = seen.attention.lengths.to(torch.float64), seen.keys.lengths.to(torch.float64)
        reducer = trunk.reducers[str(index)] if str(index) in trunk.reducers else None
        inside = False
        if reducer is not None:
            assert isinstance(reducer, TokenReducer)
            inside = reducer.place == "inside"
            arrived = seen.arrived.lengths.to(torch.float64)
            reducers += _reducer_macs(reducer, arrived, trunk.dim, block.attn.num_heads)
            reducers += reducer.output_macs(seen.reduced.lengths.to(torch.float64), trunk.dim)
            shortened = shortened or not inside
        part = reduced if shortened else full
        part += _attention_macs(trunk.dim, asking, asked)
        shortened = shortened or inside
        part = reduced if shortened else full
        part += _mlp_macs(trunk.dim, block.mlp.fc1.out_features, seen.mlp.lengths.to(torch.float64))
    projection = torch.full_like(start, trunk.dim * embed_dim)
    return ImageCost(torch.full_like(start, patch), full, reducers, reduced, projection)


def image_macs(trunk: VisionEncoder, encoding: Encoding, embed_dim: int = 0) -> Tensor:
    """MACs of each image, all parts together, float64, shape (B,)."""
    return image_cost(trunk, encoding.layouts, embed_dim).total


def dense_macs(trunk: VisionEncoder, embed_dim: int = 0) -> float:
    """MACs of an image if no token were reduced."""
    tokens = torch.tensor([trunk.grid_size[0] * trunk.grid_size[1] + 1.0], dtype=torch.float64)
    total = trunk.patch_embed.proj.weight.numel() * (tokens - 1) + trunk.dim * embed_dim
    for block in trunk.blocks:
        assert isinstance(block, Block)
        total = total + _attention_macs(trunk.dim, tokens, tokens)
        total = total + _mlp_macs(trunk.dim, block.mlp.fc1.out_features, tokens)
    return float(total)


def text_macs(tower: TextTower, lengths: Tensor) -> Tensor:
    """MACs of each caption in a packed text tower, from its length; causal attention is counted in full, as is usual.

    Args:
        tower: The tower, or a dual encoder.
        lengths: Tokens of each caption, start and end included, shape (B,).

    Returns:
        float64, shape (B,).
    """
    tokens = lengths.to(torch.float64)
    width, embed_dim = tower.text_projection.shape
    block = _attention_macs(width, tokens, tokens) + _mlp_macs(width, 4 * width, tokens)
    return len(tower.transformer.resblocks) * block + width * embed_dim


def counted_macs(model: nn.Module, example: Tensor, *, backward: bool = False) -> float:
    """MACs of a model that is not ours, by torch's counter on one example, with everything fused switched off.

    A counter misses what hides in a fused kernel: half the published dense figures of this field lack attention. So the
    fast path of ``nn.MultiheadAttention`` and fused attention are off here; of a dense Transformer the count is then
    exact.

    Args:
        model: Called with ``example`` in evaluation mode; gives a tensor, or a tuple that begins with one.
        example: Input of a batch of one.
        backward: Whether to count the backward pass too.
    """
    counter = FlopCounterMode(display=False)
    training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward), counter:
            found = model(example)
            if backward:
                found = found if isinstance(found, Tensor) else found[0]
                torch.autograd.grad(found.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)
    return counter.get_total_flops() / 2
