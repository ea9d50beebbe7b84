"""A packed batch of token sequences of unequal length.

Shape letters: T tokens of all images, B images, P original patches of all images, D channels, N tokens an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtpvit.encoder.layout import Layout

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """The value that flows between blocks: all images' tokens end to end, no padding anywhere.

    Attributes:
        features: Shape (T, D).
        layout: Where each image's tokens lie.
        size: Patches that each token stands for, and so its weight wherever tokens are weighed, float32, shape (T,); 1
            for prefix tokens, which count no patch.
        source: For each original patch the token it went into, counted within its image without the prefix
            (-1: dropped), int64, shape (P,).
        patches: Layout of the original patches; its lengths sum to P.
        grid: Rows and columns while the tokens still form one grid, else None.
        seed: One int64 an image from which every random choice about that image follows, shape (B,), or None.
        pixel_entropy: Of each original patch and of the cells it lies in, as of
            :func:`dtpvit.encoder.ops.entropy.pixel_entropy`, shape (P, 3); None where no reducer needs it.
        key_bias: Added to the attention logits of each key by later blocks, float32, shape (T,), or None.
        policy: For training where tokens are masked instead of removed: 1 for those that the others see, 0 for those
            that only see themselves, differentiable, float32, shape (T,); None where all are seen.
    """

    features: Tensor
    layout: Layout
    size: Tensor
    source: Tensor
    patches: Layout
    grid: tuple[int, int] | None = None
    seed: Tensor | None = None
    pixel_entropy: Tensor | None = None
    key_bias: Tensor | None = None
    policy: Tensor | None = None

    @classmethod
    def from_dense(
        cls,
        features: Tensor,
        *,
        num_prefix: int = 0,
        grid: tuple[int, int] | None = None,
        seed: Tensor | None = None,
        pixel_entropy: Tensor | None = None,
    ) -> Tokens:
        """Pack a dense batch of shape (B, N, D), of which each sequence starts with ``num_prefix`` prefix tokens."""
        batch, length, dim = features.shape
        device = features.device
        patches = Layout.uniform_of(batch, length - num_prefix, 0, device)
        return cls(
            features=features.reshape(batch * length, dim),
            layout=Layout.uniform_of(batch, length, num_prefix, device),
            size=torch.ones(batch * length, dtype=torch.float32, device=device),
            source=torch.arange(length - num_prefix, device=device).repeat(batch),
            patches=patches,
            grid=grid,
            seed=seed,
            pixel_entropy=pixel_entropy,
        )

    @property
    def lengths(self) -> Tensor:
        """Tokens of each image, prefix included, shape (B,)."""
        return self.layout.lengths

    @property
    def num_prefix(self) -> int:
        return self.layout.num_prefix

    def with_features(self, features: Tensor) -> Tokens:
        """The same tokens with other features, shape (T, D')."""
        return replace(self, features=features)

    def on_grid(self, grid: tuple[int, int]) -> Tokens:
        """The same tokens, known to form a grid of so many rows and columns."""
        return replace(self, grid=grid)

    def regrouped(
        self, features: Tensor, destination: Tensor, layout: Layout, size: Tensor, *, proportional: bool
    ) -> Tokens:
        """What is left once every token was dropped or went into one of fewer.

        Args:
            features: Of those left, shape (S, D).
            destination: Row among them that each token went into (-1: dropped), int64, shape (T,).
            layout: Of those left.
            size: Patches that each of them stands for, shape (S,).
            proportional: Whether later blocks weigh a token by its patches, adding the logarithm on its key.

        Raises:
            ValueError: If tokens are masked.
        """
        if self.policy is not None:
            raise ValueError("tokens that are masked in training cannot be merged or removed; use DynamicViT alone")
        image = self.patches.image
        row = destination[self._token_of_patch()]
        place = row - layout.first[image] - layout.num_prefix
        return replace(
            self,
            features=features,
            layout=layout,
            size=size,
            source=place.masked_fill((self.source < 0) | (row < 0), -1),
            grid=None,
            key_bias=size.log() if proportional else None,
        )

    def split(self) -> list[Tokens]:
        """One ``Tokens`` an image (synchronises: for tests, pictures and export)."""
        lengths, patches = self.lengths.tolist(), self.patches.lengths.tolist()
        features = self.features.split(lengths)
        sizes = self.size.split(lengths)
        sources = self.source.split(patches)
        entropies = [None] * len(lengths) if self.pixel_entropy is None else self.pixel_entropy.split(patches)
        biases, policies = (
            [None] * len(lengths) if values is None else values.split(lengths)
            for values in (self.key_bias, self.policy)
        )
        return [
            Tokens(
                features=features[i],
                layout=Layout(self.lengths[i : i + 1], length, length, self.num_prefix),
                size=sizes[i],
                source=sources[i],
                patches=Layout(self.patches.lengths[i : i + 1], patches[i], patches[i]),
                grid=self.grid,
                seed=None if self.seed is None else self.seed[i : i + 1],
                pixel_entropy=entropies[i],
                key_bias=biases[i],
                policy=policies[i],
            )
            for i, length in enumerate(lengths)
        ]

    def unpool(self) -> Tensor:
        """Spread the tokens back to the patches they stand for.

        Returns:
            Shape (P, D); a dropped patch gets zeros.
        """
        spread = self.features.index_select(0, self._token_of_patch())
        return spread.masked_fill((self.source < 0)[:, None], 0.0)

    def kept_patches(self) -> Tensor:
        """Whether each original patch is in a token that was neither dropped nor masked, bool, shape (P,)."""
        kept = self.source >= 0
        return kept if self.policy is None else kept & (self.policy[self._token_of_patch()] > 0.5)

    def _token_of_patch(self) -> Tensor:
        """Packed token of each original patch, int64, shape (P,); an image's first where the patch was dropped."""
        return self.layout.first[self.patches.image] + self.num_prefix + self.source.clamp(min=0)

    def patch_mean(self, values: Tensor) -> Tensor:
        """Mean of the values of each token's patches, 0 where it has none.

        Args:
            values: One a patch, shape (P,).

        Returns:
            float32, shape (T,).
        """
        place = self._token_of_patch()
        # Summed in float64, so that the order in which a device adds shows in no digit of the mean.
        both = torch.stack((torch.ones_like(values), values), dim=1).double().masked_fill((self.source < 0)[:, None], 0)
        count, total = both.new_zeros(self.layout.total, 2).index_add_(0, place, both).unbind(1)
        return (total / count.clamp(min=1)).to(torch.float32)

    def without_prefix(self, values: Tensor) -> Tensor:
        """The values of all tokens but class and register tokens: shape (T, ...) to (T - B * num_prefix, ...)."""
        if not self.num_prefix:
            return values
        layout = self.layout
        if layout.uniform:
            return values.unflatten(0, (layout.batch, -1))[:, self.num_prefix :].flatten(0, 1)
        left = layout.total - layout.batch * self.num_prefix
        image = torch.arange(layout.batch, device=values.device).repeat_interleave(
            layout.lengths - self.num_prefix, output_size=left
        )
        return values[torch.arange(left, device=values.device) + self.num_prefix * (image + 1)]

    def prefix_features(self) -> Tensor:
        """The class and register tokens, shape (B, num_prefix, D)."""
        offset = torch.arange(self.num_prefix, device=self.features.device)
        index = (self.layout.first[:, None] + offset).reshape(-1)
        return self.features.index_select(0, index).unflatten(0, (self.layout.batch, self.num_prefix))
