"""Patch embedding, attention, MLP and block: parts of a pre-norm Transformer, free of any reduction method.

Parameter names are timm's, so that its weights load as they are. Features are packed: (T, D), all images end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtpvit.encoder.evidence import Evidence, Need
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.attention import class_attention, cross_attention, packed_attention
from dtpvit.encoder.ops.policy import policy_attention
from dtpvit.encoder.tokens import Tokens

__all__ = [
    "Attention",
    "Block",
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "QuickGELU",
    "activation",
    "resize_position_embedding",
]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """The activation called ``name``: ``"gelu"`` or ``"quick_gelu"``.

    Raises:
        ValueError: If it is neither.
    """
    if name == "gelu":
        return nn.GELU()
    if name == "quick_gelu":
        return QuickGELU()
    raise ValueError(f"activation is {name!r}; expected gelu or quick_gelu")


class PatchEmbed(nn.Module):
    """Cut images into square patches and project each: (B, C, H, W) to (B, N, D)."""

    def __init__(self, dim: int, *, patch_size: int, in_channels: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class DropPath(nn.Module):
    """Drop a residual branch for whole images while training (Huang et al., "Deep Networks with Stochastic Depth")."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor, layout: Layout) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = torch.rand(layout.batch, device=branch.device) >= self.rate
        scale = keep.to(branch.dtype) / (1 - self.rate)
        return branch * scale[layout.image][:, None]


class Attention(nn.Module):
    """Multi-head self-attention within each image of a packed batch: (T, D) to (T, D), and the evidence asked for."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        key_bias: Tensor | None = None,
        needs: frozenset[Need] = frozenset(),
        policy: Tensor | None = None,
    ) -> tuple[Tensor, Evidence]:
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))
        evidence = Evidence(
            keys=qkv[:, 1].float().mean(1) if "keys" in needs else None,
            class_attention=class_attention(qkv, layout, key_bias) if "class_attention" in needs else None,
        )
        if policy is None:
            mixed = packed_attention(qkv, layout, key_bias=key_bias)
        else:
            mixed = policy_attention(qkv, layout, policy, key_bias=key_bias)
        return self.proj(mixed.flatten(1)), evidence

    def towards(self, x: Tensor, layout: Layout, keys: Tokens) -> Tensor:
        """What each token finds among ``keys``, from which alone keys and values come: (T, D) to (T, D)."""
        weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[1]
        q = nn.functional.linear(x, weight[:dim], bias[:dim]).unflatten(1, (self.num_heads, -1))
        kv = nn.functional.linear(keys.features, weight[dim:], bias[dim:]).unflatten(1, (2, self.num_heads, -1))
        return self.proj(cross_attention(q, kv, layout, keys.layout, key_bias=keys.key_bias).flatten(1))


class Mlp(nn.Module):
    """Two linear layers with an activation between: (..., D) to (..., D)."""

    def __init__(self, dim: int, hidden: int, *, act: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block on a packed batch, whose two halves can be run one by one."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        act: str = "gelu",
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=act)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.feed_forward(self.attend(tokens)[0])

    def attend(self, tokens: Tokens, needs: frozenset[Need] = frozenset()) -> tuple[Tokens, Evidence]:
        """The attention half, residual included, and what a reducer needs to know of it."""
        x, layout = self.norm1(tokens.features), tokens.layout
        mixed, evidence = self.attn(x, layout, tokens.key_bias, needs, tokens.policy)
        return self.add(tokens, mixed), evidence

    def feed_forward(self, tokens: Tokens) -> Tokens:
        """The MLP half, residual included."""
        return self.add(tokens, self.mlp(self.norm2(tokens.features)))

    def add(self, tokens: Tokens, branch: Tensor) -> Tokens:
        """The residual connection around a branch, shape (T, D)."""
        return tokens.with_features(tokens.features + self.drop_path(branch, tokens.layout))


def resize_position_embedding(
    embedding: Tensor, old: tuple[int, int], new: tuple[int, int], *, num_prefix: int
) -> Tensor:
    """Resample the grid part of a position embedding, bicubic with antialiasing, as timm does.

    Args:
        embedding: Shape (1, num_prefix + rows * columns, D).
        old: Rows and columns it was made for.
        new: Rows and columns wanted.
        num_prefix: Leading entries that belong to no patch.

    Returns:
        Shape (1, num_prefix + new rows * new columns, D).
    """
    if old == new:
        return embedding
    prefix, grid = embedding[:, :num_prefix], embedding[:, num_prefix:]
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    grid = nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)
    return torch.cat((prefix, grid), dim=1)
