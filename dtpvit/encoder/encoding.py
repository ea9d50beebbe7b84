"""What comes out of an encoder, and out of each of its blocks on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from dtpvit.encoder.layout import BlockLayouts, Layout
from dtpvit.encoder.reducers.base import Reduction
from dtpvit.encoder.tokens import Tokens

__all__ = ["Encoding", "EnteredBlock"]


@dataclass(frozen=True)
class Encoding:
    """What an encoder makes of a batch of images.

    Attributes:
        tokens: After the final norm.
        pooled: Read-out of the final norm, before any projection, shape (B, D).
        losses: Reducers' losses, weighted, named ``block{i}/{loss}``.
        layouts: What the halves of each block really saw, from which cost is computed.
        compression: Tokens in for each token out of each reducer, over this batch, by block.
    """

    tokens: Tokens
    pooled: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    layouts: tuple[BlockLayouts, ...] = ()
    compression: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EnteredBlock:
    """A block up to and including its reducer.

    Attributes:
        tokens: What the rest of the block is given.
        rest: The rest of the block: all of it, or its MLP half.
        arrived: Where the tokens lay that the reducer was given.
        layouts: What the halves of the block see.
        reduction: What the reducer handed back, of a block that has one.
    """

    tokens: Tokens
    rest: Callable[[Tokens], Tokens]
    arrived: Layout
    layouts: BlockLayouts
    reduction: Reduction | None = None
