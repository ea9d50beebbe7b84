"""Patch embedding, attention, MLP and block: parts of a pre-norm Transformer, free of any reduction method.

Parameter names are timm's, so that its weights load as they are. Features are packed: (T, D), all images end to end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtpvit.encoder.cost import attention_macs
from dtpvit.encoder.evidence import Evidence, Need
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.attention import class_attention, cross_attention, packed_attention
from dtpvit.encoder.ops.neighbourhood import neighbourhood_attention, neighbours
from dtpvit.encoder.ops.policy import policy_attention
from dtpvit.encoder.tokens import Tokens

__all__ = [
    "Attention",
    "Block",
    "DropPath",
    "LayerScale",
    "Mlp",
    "NeighbourhoodAttention",
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
            mixed = self.mix(qkv, layout, key_bias)
        else:
            mixed = policy_attention(qkv, layout, policy, key_bias=key_bias)
        return self.proj(mixed.flatten(1)), evidence

    def mix(self, qkv: Tensor, layout: Layout, key_bias: Tensor | None) -> Tensor:
        """Values mixed by attention: (T, 3, H, E) to (T, H, E)."""
        return packed_attention(qkv, layout, key_bias=key_bias)

    def towards(self, x: Tensor, layout: Layout, keys: Tokens) -> Tensor:
        """What each token finds among ``keys``, from which alone keys and values come: (T, D) to (T, D)."""
        weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[1]
        q = nn.functional.linear(x, weight[:dim], bias[:dim]).unflatten(1, (self.num_heads, -1))
        kv = nn.functional.linear(keys.features, weight[dim:], bias[dim:]).unflatten(1, (2, self.num_heads, -1))
        return self.proj(cross_attention(q, kv, layout, keys.layout, key_bias=keys.key_bias).flatten(1))

    def macs(self, tokens: Tensor, keys: Tensor | None = None) -> Tensor:
        """Multiply-accumulates on so many tokens of an image, any shape, that ask so many ``keys`` or one another."""
        return attention_macs(self.proj.in_features, tokens, keys=keys)


class Mlp(nn.Module):
    """Two linear layers with an activation between: (..., D) to (..., D), or to (..., ``out``)."""

    def __init__(self, dim: int, hidden: int, *, out: int | None = None, act: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def macs(self, tokens: Tensor) -> Tensor:
        """Multiply-accumulates on so many tokens of an image, any shape."""
        return tokens * (self.fc1.in_features + self.fc2.out_features) * self.fc1.out_features


class NeighbourhoodAttention(Attention):
    """Attention of each token of a grid to those around it (:mod:`dtpvit.encoder.ops.neighbourhood`).

    Args:
        dim: Width D.
        num_heads: Attention heads.
        grid: Rows and columns of the tokens of every image, which have no prefix.
        kernel_size: Keys down and across, odd; a shorter side of the grid is seen as a whole.
        dilation: Steps between keys.
        position_bias: Whether a logit depends on where the key lies from the query.

    Raises:
        ValueError: If the kernel is even, or its steps do not fit into the grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid: tuple[int, int],
        kernel_size: int = 7,
        dilation: int = 1,
        position_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads=num_heads)
        if kernel_size % 2 == 0:
            raise ValueError(f"the neighbourhood is {kernel_size} tokens wide; expected an odd number")
        self.grid, self.dilation = grid, (dilation, dilation)
        self.kernel = min(kernel_size, grid[0]), min(kernel_size, grid[1])
        for side, kernel in zip(grid, self.kernel, strict=True):
            neighbours(side, kernel, dilation)  # refuses what does not fit
        shape = num_heads, *(2 * kernel - 1 for kernel in self.kernel)
        self.position_bias = nn.Parameter(torch.zeros(shape)) if position_bias else None

    def mix(self, qkv: Tensor, layout: Layout, key_bias: Tensor | None) -> Tensor:
        return neighbourhood_attention(
            qkv, self.grid, self.kernel, self.dilation, position_bias=self.position_bias, key_bias=key_bias
        )

    def macs(self, tokens: Tensor) -> Tensor:
        return attention_macs(self.proj.in_features, tokens, self.kernel[0] * self.kernel[1])


class LayerScale(nn.Module):
    """Multiply each channel of a residual branch by a learned factor (Touvron et al., "Going deeper with Image
    Transformers", 2021)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.gamma


class Block(nn.Module):
    """Pre-norm Transformer block on a packed batch, whose two halves can be run one by one.

    Args:
        dim: Width D.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        act: ``"gelu"`` or ``"quick_gelu"``.
        eps: Of both LayerNorms.
        drop_path: Stochastic depth of both halves.
        layer_scale: Initial factor on both residual branches, 0 for none.
        attention: What makes the attention from width and heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        act: str = "gelu",
        eps: float = 1e-6,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        attention: Callable[..., Attention] = Attention,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention(dim, num_heads=num_heads)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=act)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.feed_forward(self.attend(tokens)[0])

    def attend(self, tokens: Tokens, needs: frozenset[Need] = frozenset()) -> tuple[Tokens, Evidence]:
        """The attention half, residual included, and what a reducer needs to know of it."""
        x, layout = self.norm1(tokens.features), tokens.layout
        mixed, evidence = self.attn(x, layout, tokens.key_bias, needs, tokens.policy)
        return self.add(tokens, self.ls1(mixed)), evidence

    def feed_forward(self, tokens: Tokens) -> Tokens:
        """The MLP half, residual included."""
        return self.add(tokens, self.ls2(self.mlp(self.norm2(tokens.features))))

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
