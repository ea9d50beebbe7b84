"""The CLIP text tower on packed captions.

The tower is causal and reads out at the end-of-text token, so nothing behind that token can matter: dropping it is
exact, and about four times less work at the caption lengths found on the web.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtpvit.encoder.layers import activation
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.attention import packed_attention

__all__ = ["TextTower"]


class _Attention(nn.Module):
    """Causal self-attention under the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(1, (3, self.num_heads, -1))
        return self.out_proj(packed_attention(qkv, layout, causal=True).flatten(1))


class _Mlp(nn.Module):
    def __init__(self, dim: int, act: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.gelu = activation(act)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, act: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, num_heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = _Mlp(dim, act)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x + self.attn(self.ln_1(x), layout)
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, num_heads: int, act: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(dim, num_heads, act) for _ in range(depth))
        self.grad_checkpointing = False

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, layout)
        return x


class TextTower(nn.Module):
    """open_clip's CLIP text tower, parameter names included, on packed captions.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.

    Args:
        embed_dim: Width of the space shared with images.
        context_length: Most tokens a caption may have.
        vocab_size: Entries of the tokenizer, whose highest id is the end-of-text token.
        width: Width of the tower.
        heads: Attention heads.
        layers: Blocks.
        act: ``"gelu"`` or ``"quick_gelu"``.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        context_length: int = 77,
        vocab_size: int = 49408,
        width: int = 512,
        heads: int = 8,
        layers: int = 12,
        act: str = "gelu",
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = _Transformer(width, layers, heads, act)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self._init_text(width, layers)

    def _init_text(self, width: int, layers: int) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        projection_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            assert isinstance(block, _Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=projection_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=projection_std)
            nn.init.zeros_(block.attn.out_proj.bias)

    def forward(self, text: Tensor) -> Tensor:
        """Features of captions, not normalised.

        Args:
            text: Token ids, each row ended by the highest id and padded behind it, int64, shape (B, context).

        Returns:
            Shape (B, embed_dim).
        """
        lengths = text.argmax(dim=1) + 1
        layout = Layout.fetched(lengths)
        x = self.token_embedding(text[layout.image, layout.position])
        x = x + self.positional_embedding[layout.position].to(x.dtype)
        x = self.transformer(x, layout)
        x = self.ln_final(x[layout.first + lengths - 1])
        return x @ self.text_projection.to(x.dtype)
