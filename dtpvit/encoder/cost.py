"""Multiply-accumulates of an encoder's parts, from the token counts they really saw, never by tracing.

Additions, norms, activations and softmax are left out, as is customary. On n tokens of width D the attention half of a
block costs 4 n D^2 + 2 n m D, where each token sees m (all n, or a neighbourhood); where the n ask k other tokens,
2 (n + k) D^2 + 2 n k D; its MLP half 2 r n D^2, r the MLP ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ImageCost", "attention_macs", "mlp_macs"]


@dataclass(frozen=True)
class ImageCost:
    """MACs of each image by part, each float64 of shape (B,).

    Attributes:
        patch_embed: Projection of the pixels.
        full_blocks: Transformer blocks, or halves of them, before the first reducer.
        reducers: Boundary predictors and the like, and the evidence they go by; what leads from level to level.
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


def attention_macs(
    dim: int, tokens: Tensor, seen: Tensor | float | None = None, *, keys: Tensor | None = None
) -> Tensor:
    """Of the attention half of a block, each token seeing ``seen`` others, or all ``keys``, by default the tokens."""
    keys = tokens if keys is None else keys
    return 2 * (tokens + keys) * dim * dim + 2 * tokens * (keys if seen is None else seen) * dim


def mlp_macs(dim: int, hidden: int, tokens: Tensor) -> Tensor:
    """Of the MLP half of a block."""
    return 2 * tokens * dim * hidden
