"""What every token reducer is and what it hands back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from dtpvit.encoder.evidence import Evidence, Need
from dtpvit.encoder.ops.noise import advance_seed
from dtpvit.encoder.tokens import Tokens

__all__ = ["JointThreshold", "Reduction", "TokenReducer", "reseeded"]


@dataclass(frozen=True)
class Reduction:
    """What every reducer hands back.

    Attributes:
        tokens: The fewer tokens.
        losses: Scalars to add to the task's loss, already weighted, by name.
        restore: For methods that shorten a part of a block only: from what that part made of the fewer tokens, shape
            (S, D), to rows for all the tokens that came, (T, D). None: the tokens stay few.
        scores: For :meth:`dtpvit.encoder.VisionEncoder.boundary_scores`: what a :class:`JointThreshold` finds its
            threshold in, for instance clean and noisy boundary logits of the tokens that are free to start a segment,
            float32, shape (2, F); None where it finds none.
        heat: For pictures: gives what the reducer went by, its ``heat_of``, of each token that came, in packed order,
            float, shape (T,). Nothing is computed until it is called; None where there is nothing, as in training.
    """

    tokens: Tokens
    losses: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    restore: Callable[[Tensor], Tensor] | None = None
    heat: Callable[[], Tensor] | None = None


class TokenReducer(nn.Module, ABC):
    """Turns a packed batch into one of fewer tokens.

    The contract, checked by one test over all reducers: in evaluation mode the result for an image does not depend on
    its batch and two passes agree; prefix tokens survive in place; ``size`` over the other tokens sums to the patches
    unless ``drops``; the task's gradient reaches every parameter.

    Attributes:
        place: Where it acts. ``"before"`` its block: with :attr:`Reduction.restore`, the block's output is brought back
            to the tokens that came. ``"inside"``: between the block's attention and its MLP. ``"attention"``: its
            attention alone sees the fewer tokens, made of the normed ones, and what it found is restored before it is
            added. ``"keys"``: the same of keys and values; all tokens query, and nothing is to be restored.
        needs: What it goes by beside the features. Of its block's attention only a reducer inside the block can know;
            the pixels' entropy comes with the tokens.
        needs_grid: Whether the tokens that come must form a grid.
        drops: Whether patches may be lost, or count no more in the size of what they went into.
        averages: Whether a token is the weighted mean of the patches whose source names it.
        soft: Whether a token draws on all patches of its image, so that none is ever handed on as it is; ``source``
            then names the token that draws on a patch most, and sizes are no whole numbers.
        masks: Whether tokens are masked in training and removed in evaluation, so that only training teaches.
        holds_rate: Whether the rate asked for is kept from construction on, not only once a loss has pulled it there.
        draws: When it makes random choices, as a function of ``tokens.seed``.
        fixed: Whether images of equal length keep equally many tokens, so that shapes are static.
        heat_of: What :attr:`Reduction.heat` is, in words; what ends in "probability" lies between 0 and 1.
    """

    place: Literal["before", "inside", "attention", "keys"] = "before"
    needs: frozenset[Need] = frozenset()
    needs_grid: bool = False
    drops: bool = False
    averages: bool = True
    soft: bool = False
    masks: bool = False
    holds_rate: bool = True
    draws: Literal["never", "training", "always"] = "never"
    fixed: bool = False
    heat_of: str = ""

    @property
    def counts_patches(self) -> bool:
        """Whether each patch counts once, and in the token that source names.

        The mean of the tokens behind it by size is then the mean of what is spread back to the patches.
        """
        restored = self.place in ("attention", "keys")
        return restored or (not (self.drops or self.soft) and (self.averages or not self.needs_grid))

    @abstractmethod
    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        """Reduce ``tokens``; must leave an image's result independent of its batch in evaluation mode."""

    def after_backward(self) -> None:
        """End a training step, on all ranks together, once its gradients are complete."""

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        """Multiply-accumulates of the decision, beside the averages themselves and the evidence; of soft methods all.

        Args:
            tokens: Tokens of each image that come in, float64, shape (B,).
            dim: Width D.
            num_heads: Of the block's attention.

        Returns:
            Shape (B,), float64.
        """
        return tokens.new_zeros(tokens.shape)

    def output_macs(self, tokens: Tensor, dim: int) -> Tensor:
        """Multiply-accumulates spent on the tokens of each image that go out, as of :meth:`macs`."""
        return tokens.new_zeros(tokens.shape)


def reseeded(reducer: TokenReducer, reduction: Reduction) -> Reduction:
    """With a fresh seed for the next reducer, where this one may have drawn from it."""
    tokens = reduction.tokens
    if tokens.seed is None or reducer.draws == "never":
        return reduction
    return replace(reduction, tokens=replace(tokens, seed=advance_seed(tokens.seed)))


class JointThreshold(ABC):
    """A reducer whose threshold in training is that of the whole batch, over all ranks and micro-batches."""

    @abstractmethod
    def set_threshold(self, joint: Tensor, patches: int, images: int) -> Tensor:
        """Training threshold of a step, a scalar, and calibration of the evaluation threshold, over all ranks.

        Args:
            joint: ``Reduction.scores`` of this rank's micro-batches, side by side.
            patches: Non-prefix tokens of this rank's images.
            images: How many images those are.
        """
