"""Where each image's tokens lie in a packed batch.

Shape letters: T tokens of all images, B images, C cells of grids that tokens are padded into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BlockLayouts", "Layout", "LengthGroups"]

_SHORTEST = 0.6  # of a group, as a share of its longest: higher saves cells, lower saves calls; 0.5 to 0.85 are alike


class _Derived:
    """What is computed on first use and kept in the instance, where later reads find it.

    ``functools.cached_property`` takes a lock before Python 3.12, which ``torch.compile`` cannot trace.
    """

    def __init__(self, function: Callable[[Layout], Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__
        self.name = function.__name__

    def __get__(self, layout: Layout | None, owner: type | None = None) -> Any:
        if layout is None:
            return self  # on the class, for documentation
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
        host_lengths: ``lengths`` on the host, where they are known, so that attention can group images by length.
    """

    def __init__(
        self,
        lengths: Tensor,
        longest: int,
        total: int,
        num_prefix: int = 0,
        host_lengths: Sequence[int] | None = None,
    ) -> None:
        self.lengths = lengths
        self.host_lengths = host_lengths
        self.longest = longest
        self.total = total
        self.num_prefix = num_prefix

    @classmethod
    def uniform_of(cls, batch: int, length: int, num_prefix: int, device: torch.device) -> Layout:
        """Layout of ``batch`` sequences of the same ``length``; costs no synchronisation."""
        lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
        return cls(lengths, length, batch * length, num_prefix)

    @classmethod
    def fetched(cls, lengths: Tensor, num_prefix: int = 0) -> Layout:
        """Layout of sequences whose ``lengths`` only the device knows: one synchronisation."""
        host = lengths.tolist()
        return cls(lengths, max(host), sum(host), num_prefix, host)

    def resized(self, lengths: Tensor, resize: Callable[[int], int]) -> Layout:
        """Layout of the same sequences at other lengths, without synchronising if the host knows those of now.

        Args:
            lengths: The new lengths, shape (B,).
            resize: New length from old length, for the host.
        """
        if self.uniform:
            return Layout.uniform_of(self.batch, resize(self.longest), self.num_prefix, self.lengths.device)
        if self.host_lengths is None:
            return Layout.fetched(lengths, self.num_prefix)
        host = [resize(length) for length in self.host_lengths]
        return Layout(lengths, max(host), sum(host), self.num_prefix, host)

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

    @_Derived
    def groups(self) -> LengthGroups | None:
        """Images grouped by length, or None where the host does not know the lengths."""
        return None if self.host_lengths is None else LengthGroups.of(self, self.host_lengths)


@dataclass(frozen=True)
class BlockLayouts:
    """What the parts of a block saw, different where a reducer acts on one of them.

    Attributes:
        arrived: Where the tokens lay that came to the block, and to its reducer.
        attention: Where those lay that asked in the attention half.
        keys: Where those lay that were asked.
        mlp: Where those lay that the MLP half was given.
    """

    arrived: Layout
    attention: Layout
    keys: Layout
    mlp: Layout

    @classmethod
    def of(cls, arrived: Layout, attention: Layout | None = None, mlp: Layout | None = None) -> BlockLayouts:
        """Of a block whose keys are the tokens that ask; what is not given is as it arrived."""
        attention = attention or arrived
        return cls(arrived, attention, attention, mlp or arrived)

    @property
    def reduced(self) -> Layout:
        """Where the tokens lay that the block's reducer left."""
        return min(self.attention, self.keys, self.mlp, key=lambda layout: layout.total)


@dataclass(frozen=True)
class LengthGroups:
    """Images of like length together, each group padded to its own longest.

    Attributes:
        shapes: Images and longest length of each group, and whether no cell is empty.
        cells: Packed position behind each cell, group after group; padding repeats the image's last token, shape (C,).
        places: Cell of each packed token, shape (T,).
        empty: True where a cell holds no token, shape (C,).
    """

    shapes: list[tuple[int, int, bool]]
    cells: Tensor
    places: Tensor
    empty: Tensor

    @classmethod
    def single(cls, layout: Layout) -> LengthGroups:
        """All images in one group."""
        shape = (layout.batch, layout.longest, False)
        return cls([shape], layout.padded, layout.unpadded, layout.padding.flatten())

    @classmethod
    def of(cls, layout: Layout, lengths: Sequence[int]) -> LengthGroups:
        """Group the images of a layout.

        Args:
            layout: The layout.
            lengths: Its lengths, on the host.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        shapes, width = list[tuple[int, int, bool]](), [0] * len(lengths)
        members = list[int]()
        for rank, image in enumerate(order):
            members.append(image)
            longest = lengths[members[0]]
            last = rank + 1 == len(order)
            if last or lengths[order[rank + 1]] < _SHORTEST * longest:
                shapes.append((len(members), longest, lengths[image] == longest))
                for member in members:
                    width[member] = longest
                members = []
        device = layout.lengths.device
        known = torch.tensor([order, [width[image] for image in order]])
        if device.type == "cuda":  # else the host would wait until the device has come this far
            known = known.pin_memory()
        images, widths = known.to(device, non_blocking=True)
        begins = widths.cumsum(0) - widths
        total = sum(width)
        row = torch.arange(len(order), device=device).repeat_interleave(widths, output_size=total)
        column = torch.arange(total, device=device) - begins[row]
        image = images[row]
        cells = layout.first[image] + torch.minimum(column, layout.lengths[image] - 1)
        begin_of_image = torch.empty_like(begins).scatter_(0, images, begins)
        places = begin_of_image[layout.image] + layout.position
        return cls(shapes, cells, places, column >= layout.lengths[image])
