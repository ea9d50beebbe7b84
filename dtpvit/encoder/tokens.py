"""A packed batch of token sequences of unequal length.

Shape letters: T tokens of all images, B images, P original patches of all images, D channels, N tokens an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Layout", "Tokens"]


class _Derived:
    """A tensor computed on first use and kept in the instance, where later reads find it.

    ``functools.cached_property`` takes a lock before Python 3.12, which ``torch.compile`` cannot trace.
    """

    def __init__(self, function: Callable[[Layout], Tensor]) -> None:
        self.function, self.__doc__ = function, function.__doc__
        self.name = function.__name__

    def __get__(self, layout: Layout | None, owner: type | None = None) -> Tensor:
        if layout is None:
            return self  # pyright: ignore[reportReturnType]: on the class, for documentation
        value = self.function(layout)
        setattr(layout, self.name, value)
        return value


class Layout:
    """Where each image's tokens lie in a packed batch, and what attention needs to know about it.

    Derived index tensors are computed on first use and kept, so that all blocks between two reducers share them.

    Args:
        lengths: Tokens of each image, prefix included, int64, shape (B,).
        longest: ``lengths.max()``, known on the host so that no block has to synchronise.
        total: ``lengths.sum()``, likewise.
        num_prefix: Class and register tokens that each sequence starts with.
    """

    def __init__(self, lengths: Tensor, longest: int, total: int, num_prefix: int = 0) -> None:
        self.lengths = lengths
        self.longest = longest
        self.total = total
        self.num_prefix = num_prefix

    @classmethod
    def uniform_of(cls, batch: int, length: int, num_prefix: int, device: torch.device) -> Layout:
        """Layout of ``batch`` sequences of the same ``length``; costs no synchronisation."""
        lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
        return cls(lengths, length, batch * length, num_prefix)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def uniform(self) -> bool:
        """Whether every sequence has the same length, so that a packed batch is a dense one."""
        return self.total == self.batch * self.longest

    @_Derived
    def first(self) -> Tensor:
        """Packed position of each sequence's first token, shape (B,)."""
        if self.uniform:
            return torch.arange(self.batch, device=self.lengths.device) * self.longest
        return self.lengths.cumsum(0) - self.lengths

    @_Derived
    def image(self) -> Tensor:
        """Image that each token belongs to, int64, shape (T,)."""
        index = torch.arange(self.batch, device=self.lengths.device)
        if self.uniform:
            return index[:, None].expand(-1, self.longest).reshape(-1)
        return index.repeat_interleave(self.lengths, output_size=self.total)

    @_Derived
    def position(self) -> Tensor:
        """Position of each token within its own sequence, prefix counted, shape (T,)."""
        if self.uniform:
            return torch.arange(self.longest, device=self.lengths.device).expand(self.batch, -1).reshape(-1)
        return torch.arange(self.total, device=self.lengths.device) - self.first[self.image]

    @_Derived
    def prefix(self) -> Tensor:
        """Whether a token is a class or register token, bool, shape (T,)."""
        return self.position < self.num_prefix

    @_Derived
    def opening(self) -> Tensor:
        """Whether a token must start a segment: prefix tokens and each image's first patch, bool, shape (T,)."""
        return self.position <= self.num_prefix

    @_Derived
    def free(self) -> Tensor:
        """Packed positions of the tokens that may or may not start a segment, ascending, without synchronising."""
        count = self.total - self.batch * (self.num_prefix + 1)
        return torch.nonzero_static(~self.opening, size=count).squeeze(1)

    @_Derived
    def cumulative(self) -> Tensor:
        """Sequence borders as variable-length kernels want them, int32, shape (B + 1,)."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @_Derived
    def padded(self) -> Tensor:
        """Packed position behind each cell of a (B, longest) grid; padding repeats the last token."""
        if self.uniform:
            return torch.arange(self.total, device=self.lengths.device)
        column = torch.arange(self.longest, device=self.lengths.device)
        inside = torch.minimum(column, self.lengths[:, None] - 1)
        return (self.first[:, None] + inside).reshape(-1)

    @_Derived
    def unpadded(self) -> Tensor:
        """Cell of the (B, longest) grid that holds each packed token, shape (T,)."""
        if self.uniform:
            return self.padded
        return self.image * self.longest + self.position

    @_Derived
    def padding(self) -> Tensor:
        """True where a cell of the (B, longest) grid holds no token, shape (B, longest)."""
        column = torch.arange(self.longest, device=self.lengths.device)
        return column >= self.lengths[:, None]


@dataclass(frozen=True)
class Tokens:
    """The value that flows between blocks: all images' tokens end to end, no padding anywhere.

    Attributes:
        features: Shape (T, D).
        layout: Where each image's tokens lie.
        size: Patches that each token stands for, float32, shape (T,); 1 for prefix tokens, which count no patch.
        source: For each original patch the token it went into, counted within its image without the prefix
            (-1: dropped), int64, shape (P,).
        patches: Layout of the original patches; its lengths sum to P.
        grid: Rows and columns while the tokens still form one grid, else None.
        seed: One int64 an image from which every random choice about that image follows, shape (B,), or None.
        key_bias: Added to the attention logits of each key by later blocks, float32, shape (T,), or None.
    """

    features: Tensor
    layout: Layout
    size: Tensor
    source: Tensor
    patches: Layout
    grid: tuple[int, int] | None = None
    seed: Tensor | None = None
    key_bias: Tensor | None = None

    @classmethod
    def from_dense(
        cls, features: Tensor, *, num_prefix: int = 0, grid: tuple[int, int] | None = None, seed: Tensor | None = None
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

    def split(self) -> list[Tokens]:
        """One ``Tokens`` an image (synchronises: for tests, pictures and export)."""
        lengths, patches = self.lengths.tolist(), self.patches.lengths.tolist()
        features = self.features.split(lengths)
        sizes = self.size.split(lengths)
        sources = self.source.split(patches)
        biases = [None] * len(lengths) if self.key_bias is None else self.key_bias.split(lengths)
        return [
            Tokens(
                features=features[i],
                layout=Layout(self.lengths[i : i + 1], length, length, self.num_prefix),
                size=sizes[i],
                source=sources[i],
                patches=Layout(self.patches.lengths[i : i + 1], patches[i], patches[i]),
                grid=self.grid,
                seed=None if self.seed is None else self.seed[i : i + 1],
                key_bias=biases[i],
            )
            for i, length in enumerate(lengths)
        ]

    def unpool(self) -> Tensor:
        """Spread the tokens back to the patches they stand for.

        Returns:
            Shape (P, D); a dropped patch gets zeros.
        """
        patch_image = self.patches.image
        index = self.layout.first[patch_image] + self.num_prefix + self.source.clamp(min=0)
        spread = self.features.index_select(0, index)
        return spread.masked_fill((self.source < 0)[:, None], 0.0)

    def prefix_features(self) -> Tensor:
        """The class and register tokens, shape (B, num_prefix, D)."""
        offset = torch.arange(self.num_prefix, device=self.features.device)
        index = (self.layout.first[:, None] + offset).reshape(-1)
        return self.features.index_select(0, index).unflatten(0, (self.layout.batch, self.num_prefix))
