"""Multiply-accumulates of an encoder with what stands behind it, of a text tower, and of models that are not ours.

GMACs are multiply-accumulates / 1e9; two FLOPs each. What counts is said in :mod:`dtpvit.encoder.cost`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dtpvit.encoder import BlockLayouts, Encoding, ImageEncoder
from dtpvit.encoder.cost import ImageCost, attention_macs, mlp_macs
from dtpvit.encoder.text import TextTower

__all__ = ["counted_macs", "dense_macs", "image_cost", "image_macs", "text_macs"]


def image_cost(trunk: ImageEncoder, layouts: tuple[BlockLayouts, ...], embed_dim: int = 0) -> ImageCost:
    """Cost of each image of a batch.

    Args:
        trunk: The encoder.
        layouts: What the parts of each block saw, from :class:`dtpvit.encoder.Encoding`.
        embed_dim: Outputs of the projection behind the encoder, 0 for none.
    """
    cost = trunk.cost(layouts)
    return replace(cost, projection=torch.full_like(cost.patch_embed, trunk.dim * embed_dim))


def image_macs(trunk: ImageEncoder, encoding: Encoding, embed_dim: int = 0) -> Tensor:
    """MACs of each image, all parts together, float64, shape (B,)."""
    return image_cost(trunk, encoding.layouts, embed_dim).total


def dense_macs(trunk: ImageEncoder, embed_dim: int = 0) -> float:
    """MACs of an image if no token were reduced."""
    return trunk.dense_macs() + trunk.dim * embed_dim


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
    block = attention_macs(width, tokens) + mlp_macs(width, 4 * width, tokens)
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
