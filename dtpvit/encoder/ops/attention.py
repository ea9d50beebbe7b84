"""Attention over a packed batch: the only operation that knows about sequences.

Shape letters: T packed tokens, S packed keys where they are others, B images, N longest sequence, H heads, E channels a
head.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dtpvit.encoder.layout import Layout, LengthGroups
from dtpvit.encoder.ops.rows import take_rows

__all__ = ["class_attention", "cross_attention", "fold_if_rounded", "fold_key_bias", "packed_attention"]


def packed_attention(
    qkv_T3HE: Tensor, layout: Layout, *, key_bias: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention of each image's tokens among themselves.

    Equal lengths are a view, without copy or mask; ragged batches go to the variable-length flash kernel on CUDA in
    half precision, elsewhere they are padded for this one call.

    Args:
        qkv_T3HE: Queries, keys and values side by side, as one projection makes them, shape (T, 3, H, E).
        layout: Where each image's tokens lie.
        key_bias: Added to the logits of each key, float32, shape (T,); it gets no gradient.
        causal: Whether a token sees only those before it in its sequence, and itself.

    Returns:
        Shape (T, H, E).

    Raises:
        ValueError: If both ``key_bias`` and ``causal`` are asked for.
    """
    if key_bias is not None and causal:
        raise ValueError("a key bias with causal attention is not supported")
    if _has_varlen_kernel(qkv_T3HE) and not (layout.uniform and key_bias is None):
        q, k, v = qkv_T3HE.unbind(1)
        return _varlen(q, k, v, layout, layout, key_bias, causal)
    dim, qkv_T3HE, key_bias = qkv_T3HE.shape[-1], *fold_if_rounded(qkv_T3HE, key_bias)
    return _sdpa(qkv_T3HE, layout, key_bias, causal, dim**-0.5)[..., :dim]


def cross_attention(
    q_THE: Tensor, kv_S2HE: Tensor, layout: Layout, key_layout: Layout, *, key_bias: Tensor | None = None
) -> Tensor:
    """Softmax attention of each image's tokens to keys that are not the same tokens.

    Args:
        q_THE: Queries, shape (T, H, E).
        kv_S2HE: Keys and values, shape (S, 2, H, E).
        layout: Where each image's queries lie.
        key_layout: Where its keys and values lie.
        key_bias: Added to the logits of each key, float32, shape (S,); it gets no gradient.

    Returns:
        Shape (T, H, E).
    """
    uniform, dim = layout.uniform and key_layout.uniform, q_THE.shape[-1]
    if _has_varlen_kernel(q_THE) and not (uniform and key_bias is None):
        return _varlen(q_THE, kv_S2HE[:, 0], kv_S2HE[:, 1], layout, key_layout, key_bias, False)
    if key_bias is not None and _rounds(q_THE):
        q_THE, *kv = fold_key_bias(q_THE, kv_S2HE[:, 0], kv_S2HE[:, 1], key_bias)
        kv_S2HE, key_bias = torch.stack(kv, dim=1), None
    if not uniform:
        q_THE = take_rows(q_THE, layout.padded, layout.unpadded)
        kv_S2HE = take_rows(kv_S2HE, key_layout.padded, key_layout.unpadded)
        bias = torch.zeros(kv_S2HE.shape[:1], device=q_THE.device) if key_bias is None else key_bias[key_layout.padded]
        key_bias = bias.masked_fill(key_layout.padding.flatten(), float("-inf"))
    q = q_THE.unflatten(0, (layout.batch, layout.longest)).transpose(1, 2)
    k, v = kv_S2HE.unflatten(0, (layout.batch, key_layout.longest)).permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if key_bias is None else key_bias.view(layout.batch, key_layout.longest)
    out = _attend(q, k, v, mask, dim**-0.5)[..., :dim]
    return out if uniform else take_rows(out, layout.unpadded, layout.padded, unread=layout.padding)


def class_attention(qkv_T3HE: Tensor, layout: Layout, key_bias: Tensor | None = None) -> Tensor:
    """How much the first token of each image attends to each of its tokens, averaged over heads.

    The one row of the attention matrix that a reducer may ask for, in time linear in the tokens, so that attention
    itself stays fused.

    Args:
        qkv_T3HE: As in :func:`packed_attention`.
        layout: Where each image's tokens lie.
        key_bias: As in :func:`packed_attention`.

    Returns:
        float32 or wider, shape (T,).

    Raises:
        ValueError: If the sequences have no class token.
    """
    if not layout.num_prefix:
        raise ValueError("class attention needs a class token in front of each sequence; there is none")
    queries, keys, cells = qkv_T3HE[:, 0], qkv_T3HE[:, 1], (layout.batch, layout.longest)
    # Equal lengths need no index, which a compiled graph could not derive within a checkpointed block.
    q_BHE = queries.unflatten(0, cells)[:, 0] if layout.uniform else queries.index_select(0, layout.first)
    keys = keys if layout.uniform else take_rows(keys, layout.padded, layout.unpadded)
    k_BNHE = keys.unflatten(0, cells)
    wide = torch.promote_types(keys.dtype, torch.float32)  # methods rank tokens by it
    with torch.autocast(keys.device.type, enabled=False):
        logits_BHN = torch.einsum("bhe,bnhe->bhn", q_BHE.to(wide), k_BNHE.to(wide)) * q_BHE.shape[-1] ** -0.5
    if key_bias is not None:
        bias = key_bias if layout.uniform else key_bias[layout.padded]
        logits_BHN = logits_BHN + bias.view(layout.batch, 1, layout.longest)
    if layout.uniform:
        return logits_BHN.softmax(-1).mean(1).flatten()
    row = logits_BHN.masked_fill(layout.padding[:, None], float("-inf")).softmax(-1).mean(1).flatten()
    return take_rows(row, layout.unpadded, layout.padded, unread=layout.padding)


def fold_key_bias(q_THE: Tensor, k_SHE: Tensor, v_SHE: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write an additive key bias into the channels, for flash kernels and where a mask would round it.

    Three channels hold sqrt(E) times the bias, rounded, and its remainders, so that half precision keeps it to
    float32 accuracy; the head is padded with zeros to a multiple of 8. Call the kernel with scale = 1/sqrt(E) of the
    original E and cut its output back to E channels.

    Args:
        q_THE: Queries, shape (T, H, E).
        k_SHE: Keys, of these tokens or others, shape (S, H, E).
        v_SHE: Values, likewise.
        key_bias: Shape (S,).

    Returns:
        Queries, keys, values as they came but with E' channels, the multiple of 8 at or above E + 3.
    """
    total, heads, dim = k_SHE.shape
    parts, rest = [], key_bias.to(torch.float64 if q_THE.dtype == torch.float64 else torch.float32) * dim**0.5
    for _ in range(3):
        parts.append(rest.to(k_SHE.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    extra = 3 + (-(dim + 3)) % 8
    ones = q_THE.new_ones(q_THE.shape[0], heads, 3)
    bias = torch.stack(parts, dim=-1)[:, None, :].expand(total, heads, 3)
    q, k = (pad(torch.cat(both, dim=-1), (0, extra - 3)) for both in ((q_THE, ones), (k_SHE, bias)))
    v = pad(v_SHE, (0, extra))
    return q, k, v


def fold_if_rounded(qkv_T3HE: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Queries, keys and values, and what bias is left for a mask, which half precision would round."""
    if key_bias is None or not _rounds(qkv_T3HE):
        return qkv_T3HE, key_bias
    q, k, v = qkv_T3HE.unbind(1)
    return torch.stack(fold_key_bias(q, k, v, key_bias), dim=1), None


def _rounds(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16)


def _sdpa(qkv: Tensor, layout: Layout, key_bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    if layout.uniform:
        mask = None if key_bias is None else key_bias.view(layout.batch, layout.longest)
        return _dense(qkv, layout.batch, layout.longest, mask, causal, scale)
    # A compiled graph for each combination of groups would help nobody.
    groups = (None if torch.compiler.is_compiling() else layout.groups) or LengthGroups.single(layout)
    arguments = qkv, groups, key_bias, causal, scale
    if torch.is_grad_enabled() and qkv.requires_grad:
        # Padding costs little to compute, but up to three times the tokens if kept for the backward pass.
        out = checkpoint(_padded, *arguments, use_reentrant=False, preserve_rng_state=False)
        return out  # pyright: ignore[reportReturnType]
    return _padded(*arguments)


def _dense(qkv: Tensor, images: int, length: int, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention over a grid of ``images`` rows of ``length`` cells: (images * length, 3, H, E) to (..., H, E)."""
    q, k, v = qkv.unflatten(0, (images, length)).permute(2, 0, 3, 1, 4).unbind(0)
    return _attend(q, k, v, bias, scale, causal)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Grids of queries, keys and values, each of (B, H, N, E), and a bias (B, N of the keys), to (B * N, H, E)."""
    mask = None if bias is None else bias.to(q.dtype)[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    found = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return found.transpose(1, 2).flatten(0, 1)


def _padded(qkv: Tensor, groups: LengthGroups, key_bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    cells = take_rows(qkv, groups.cells, groups.places)
    bias = None
    if not causal:  # there padding lies behind every real token, and the causal mask alone hides it
        bias = torch.zeros(groups.empty.shape, device=qkv.device) if key_bias is None else key_bias[groups.cells]
        bias = bias.masked_fill(groups.empty, float("-inf"))
    found: list[Tensor] = []
    start = 0
    for images, length, full in groups.shapes:
        part = slice(start, start + images * length)
        start = part.stop
        needed = bias is not None and not (full and key_bias is None)
        mask = bias[part].view(images, length) if bias is not None and needed else None
        found.append(_dense(cells[part], images, length, mask, causal, scale))
    out = found[0] if len(found) == 1 else torch.cat(found)
    return take_rows(out, groups.places, groups.cells, unread=groups.empty)


def _has_varlen_kernel(q: Tensor) -> bool:
    """Flash attention: half precision, from the Ampere generation on."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _capability(q.device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, key_layout: Layout, key_bias: Tensor | None, causal: bool
) -> Tensor:
    """The one place that knows the signature of torch's variable-length kernel, which changed after 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    dim = q.shape[-1]
    scale = dim**-0.5
    if key_bias is not None:
        q, k, v = fold_key_bias(q, k, v, key_bias)
    elif dim % 8:
        q, k, v = (pad(x, (0, -dim % 8)) for x in (q, k, v))
    known = _varlen_parameters()
    options: dict[str, object] = {}
    if "scale" in known:
        options["scale"] = scale
    else:  # the kernel then scales by the padded width; bring the queries to what that makes right
        q = q * (scale * q.shape[-1] ** 0.5)
    if causal:
        options.update({"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)})
    if "num_splits" in known:
        options["num_splits"] = 1  # chosen by the kernel it would follow the longest image of the batch
    borders = layout.cumulative, key_layout.cumulative
    out: Any = varlen_attn(q, k, v, *borders, layout.longest, key_layout.longest, **options)  # pyright: ignore
    return out[..., :dim]
