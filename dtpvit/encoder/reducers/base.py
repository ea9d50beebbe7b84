"""What every token reducer is and what it hands back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from dtpvit.encoder.evidence import Evidence, Need
from dtpvit.encoder.tokens import Tokens

__all__ = ["Reduction", "TokenReducer"]


@dataclass(frozen=True)
class Reduction:
    """What every reducer hands back.

    Attributes:
        tokens: The fewer tokens.
        losses: Scalars to add to the task's loss, already weighted, by name.
        scores: For :meth:`dtpvit.encoder.VisionEncoder.boundary_scores`: clean and noisy boundary logits of the tokens
            that are free to start a segment, float32, shape (2, F); None for methods without logits.
    """

    tokens: Tokens
    losses: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None


class TokenReducer(nn.Module, ABC):
    """Turns a packed batch into one of fewer tokens.

    The contract, checked by one test over all reducers: in evaluation mode the result for an image does not depend on
    its batch and two passes agree; prefix tokens survive in place; ``size`` over the other tokens sums to the patches
    unless ``drops``; the task's gradient reaches every parameter.

    Attributes:
        place: Where it acts: ``"before"`` its block, or ``"inside"``, between the block's attention and its MLP.
        needs: What of its block's attention it goes by; only a reducer inside a block can have it.
        drops: Whether patches may be lost.
        averages: Whether a token is the weighted mean of the patches whose source names it.
        draws: When it makes random choices, as a function of ``tokens.seed``.
        fixed: Whether images of equal length keep equally many tokens, so that shapes are static.
    """

    place: Literal["before", "inside"] = "before"
    needs: frozenset[Need] = frozenset()
    drops: bool = False
    averages: bool = True
    draws: Literal["never", "training", "always"] = "never"
    fixed: bool = False

    @abstractmethod
    def forward(self, tokens: Tokens, evidence: Evidence) -> Reduction:
        """Reduce ``tokens``; must leave an image's result independent of its batch in evaluation mode."""

    def after_backward(self) -> None:
        """End a training step, on all ranks together, once its gradients are complete."""

    def macs(self, tokens: Tensor, dim: int, num_heads: int) -> Tensor:
        """Multiply-accumulates of the decision, beside the averages themselves and the evidence.

        Args:
            tokens: Tokens of each image that come in, float64, shape (B,).
            dim: Width D.
            num_heads: Of the block's attention.

        Returns:
            Shape (B,), float64.
        """
        return tokens.new_zeros(tokens.shape)
