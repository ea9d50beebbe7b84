"""Tokens of a batch of images, counted without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtpvit.encoder import Encoding

__all__ = ["TokenCount"]


@dataclass(frozen=True)
class TokenCount:
    """What an encoder made of some images; numbers of the host but one, so that counting does not synchronise.

    A task's ``training_step`` returns ``{"loss": loss, "token_count": TokenCount.of(encoding)}``.

    Attributes:
        images: Number of images.
        patches: Patches that they were cut into, in all.
        tokens: Tokens after the last reducer, class and register tokens included, in all.
        patch_tokens: The same without these.
        longest: Tokens of the image with most.
        shortest: Tokens of the image with fewest, on the encoder's device, shape ().
    """

    images: int
    patches: int
    tokens: int
    patch_tokens: int
    longest: int
    shortest: Tensor

    @classmethod
    def of(cls, encoding: Encoding) -> TokenCount:
        """Count what is in ``encoding``."""
        layout = encoding.tokens.layout
        return cls(
            images=layout.batch,
            patches=encoding.tokens.patches.total,
            tokens=layout.total,
            patch_tokens=layout.total - layout.batch * layout.num_prefix,
            longest=layout.longest,
            shortest=layout.lengths.min(),
        )

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(
            images=self.images + other.images,
            patches=self.patches + other.patches,
            tokens=self.tokens + other.tokens,
            patch_tokens=self.patch_tokens + other.patch_tokens,
            longest=max(self.longest, other.longest),
            shortest=torch.minimum(self.shortest, other.shortest),
        )
