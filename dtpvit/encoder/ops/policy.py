"""Attention in which masked tokens are seen by nobody but themselves, differentiable in the mask.

Shape letters: T packed tokens, B images, N longest sequence, H heads, E channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.rows import take_rows

__all__ = ["policy_attention"]

_EPS = 1e-6


def policy_attention(qkv_T3HE: Tensor, layout: Layout, policy: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Attention masking: a soft mask on the keys whose gradient teaches whoever made it.

    Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021: with logits
    S, G_ij = 1 where i = j, else the policy of token j, and A = exp(S - max S) * G, the shares are (A + eps / N) /
    (sum A + eps). The matrix is there as a whole, in float32: this is for training only.

    Args:
        qkv_T3HE: As in :func:`dtpvit.encoder.ops.attention.packed_attention`.
        layout: Where each image's tokens lie.
        policy: 1 for tokens that the others see, 0 for those that they do not, float32, shape (T,).
        key_bias: Added to the logits of each key, float32, shape (T,).

    Returns:
        Shape (T, H, E).
    """
    q_BHNE, k_BHNE, v_BHNE = _cells(qkv_T3HE, layout).permute(2, 0, 3, 1, 4).unbind(0)
    seen_BN = _cells(policy, layout)
    wide = torch.promote_types(qkv_T3HE.dtype, torch.float32)
    with torch.autocast(qkv_T3HE.device.type, enabled=False):
        logits = q_BHNE.to(wide) @ k_BHNE.to(wide).transpose(2, 3) * q_BHNE.shape[-1] ** -0.5
        if key_bias is not None:
            logits = logits + _cells(key_bias, layout)[:, None, None]
        if not layout.uniform:
            logits = logits.masked_fill(layout.padding[:, None, None], float("-inf"))
        itself = torch.eye(layout.longest, dtype=torch.bool, device=policy.device)
        mask = seen_BN[:, None, None].expand(-1, 1, layout.longest, -1).masked_fill(itself, 1.0)
        weight = (logits - logits.amax(3, keepdim=True)).exp() * mask
        count = layout.lengths.to(wide).view(-1, 1, 1, 1)
        share = (weight + _EPS / count) / (weight.sum(3, keepdim=True) + _EPS)
        if not layout.uniform:  # the eps would count it
            share = share.masked_fill(layout.padding[:, None, None], 0.0)
        out = share.to(v_BHNE.dtype) @ v_BHNE
    cells = out.transpose(1, 2).flatten(0, 1)
    if layout.uniform:
        return cells
    return take_rows(cells, layout.unpadded, layout.padded, unread=layout.padding)


def _cells(values: Tensor, layout: Layout) -> Tensor:
    """Each image's values padded to the longest: (T, ...) to (B, N, ...)."""
    rows = values if layout.uniform else take_rows(values, layout.padded, layout.unpadded)
    return rows.unflatten(0, (layout.batch, layout.longest))
