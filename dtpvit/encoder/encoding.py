"""What comes out of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dtpvit.encoder.layout import BlockLayouts
from dtpvit.encoder.tokens import Tokens

__all__ = ["Encoding"]


@dataclass(frozen=True)
class Encoding:
    """What an encoder makes of a batch of images.

    Attributes:
        tokens: After the final norm.
        pooled: Read-out of the final norm, before any projection, shape (B, D).
        losses: Reducers' losses, weighted, named ``block{i}/{loss}``.
        layouts: What the parts of each block really saw, from which cost is computed.
        compression: Tokens in for each token out of each reducer, over this batch, by block.
    """

    tokens: Tokens
    pooled: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    layouts: tuple[BlockLayouts, ...] = ()
    compression: dict[int, float] = field(default_factory=dict)
