"""What a token reducer is told beside the tokens.

Shape letters: T packed tokens, E channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["Evidence", "Need"]

Need = Literal["keys", "class_attention", "pixel_entropy"]  # the last comes with the tokens, not from a block


@dataclass(frozen=True)
class Evidence:
    """What a reducer may go by; a block computes what its reducer ``needs``, and nothing else.

    Attributes:
        threshold: Training threshold on the noisy boundary logits, a scalar, where the caller fixes it because the
            batch arrives in several pieces; None lets the reducer find its own.
        keys: The block's keys, averaged over its heads, float32, shape (T, E).
        class_attention: How much each image's first token attends to each token, averaged over the block's heads,
            float32, shape (T,); sums to 1 over the image.
    """

    threshold: Tensor | None = None
    keys: Tensor | None = None
    class_attention: Tensor | None = None
