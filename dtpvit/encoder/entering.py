"""A block and its reducer: before the block, inside it, or for its attention alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dtpvit.encoder.evidence import Evidence
from dtpvit.encoder.layers import Block
from dtpvit.encoder.layout import BlockLayouts
from dtpvit.encoder.reducers.base import Reduction, TokenReducer, reseeded
from dtpvit.encoder.tokens import Tokens

__all__ = ["EnteredBlock", "enter"]

Part = Callable[[Tokens], Tokens]


@dataclass(frozen=True)
class EnteredBlock:
    """A block up to and including its reducer.

    Attributes:
        tokens: What the rest of the block is given.
        rest: The rest of the block: all of it, or its MLP half, and the way back where the tokens are restored.
        layouts: What the parts of the block see.
        reduction: What the reducer handed back, of a block that has one.
    """

    tokens: Tokens
    rest: Part
    layouts: BlockLayouts
    reduction: Reduction | None = None


def enter(
    block: Block, reducer: TokenReducer, tokens: Tokens, *, threshold: Tensor | None, run: Callable[..., Any]
) -> EnteredBlock:
    """A block up to and including its reducer.

    Args:
        block: The block.
        reducer: Its reducer.
        tokens: What comes to the block.
        threshold: As in :class:`Evidence`.
        run: Calls a part of the block, the first argument, with the others.
    """
    came = tokens.layout
    if reducer.place == "before":
        reduction = _reduced(reducer, tokens, Evidence(threshold))
        layouts = BlockLayouts.of(came, reduction.tokens.layout, reduction.tokens.layout)
        return EnteredBlock(reduction.tokens, _restoring(block, tokens, reduction), layouts, reduction)
    if reducer.place == "inside":
        attended, evidence = run(block.attend, tokens, reducer.needs)
        reduction = _reduced(reducer, attended, replace(evidence, threshold=threshold))
        layouts = BlockLayouts.of(came, mlp=reduction.tokens.layout)
        return EnteredBlock(reduction.tokens, _restoring(block.feed_forward, attended, reduction), layouts, reduction)
    normed = tokens.with_features(run(block.norm1, tokens.features))
    reduction = _reduced(reducer, normed, Evidence(threshold))
    fewer, restore = reduction.tokens, reduction.restore
    if reducer.place == "keys":
        layouts = BlockLayouts(came, came, fewer.layout, came)
    else:
        layouts = BlockLayouts.of(came, fewer.layout)

    def rest(tokens: Tokens) -> Tokens:
        # Masked tokens are never regrouped: as keys these are all there are, and every token asks all.
        if reducer.place == "keys" and fewer.policy is None:
            found = block.attn.towards(normed.features, came, fewer)
        else:
            found = block.attn(fewer.features, fewer.layout, fewer.key_bias, policy=fewer.policy)[0]
            found = found if restore is None else restore(found)
        return block.feed_forward(block.add(tokens, block.ls1(found)))

    return EnteredBlock(replace(tokens, seed=fewer.seed), rest, layouts, reduction)


def _reduced(reducer: TokenReducer, tokens: Tokens, evidence: Evidence) -> Reduction:
    return reseeded(reducer, reducer(tokens, evidence))


def _restoring(part: Part, tokens: Tokens, reduction: Reduction) -> Part:
    """``part`` of a block, and from what it makes of the fewer tokens back to ``tokens``, if they are restored."""
    restore = reduction.restore
    if restore is None:
        return part

    def around(fewer: Tokens) -> Tokens:
        return replace(tokens, features=restore(part(fewer).features), seed=fewer.seed)

    return around
