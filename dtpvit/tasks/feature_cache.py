"""Features of a trunk that does not change, computed once for each image."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

__all__ = ["EncodedImages", "FeatureCache"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedImages:
    """What a frozen encoder made of some images.

    Attributes:
        features: Its read-out, shape (B, D).
        tokens: Tokens after the last reducer, int64, shape (B,).
        macs: Multiply-accumulates, float64, shape (B,).
    """

    features: Tensor
    tokens: Tensor
    macs: Tensor

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.features, self.tokens, self.macs


class FeatureCache:
    """Remembers the features of images by their pixels, in the host's memory: 4 D bytes an image.

    Keyed by content, it needs to know nothing of the data module: order, shuffling, resuming and the parts of the
    ranks stay those of a run without it. Images are still read and decoded; the first pass over the data fills it.
    """

    def __init__(self) -> None:
        self._row: dict[int, int] = {}
        self._columns: list[Tensor] = []
        self._asked = self._found = 0

    def __len__(self) -> int:
        return len(self._row)

    def look_up(self, batch: dict[str, Any], *, training: bool) -> dict[str, Any]:
        """The batch, on the host, with the known images replaced by what was made of them.

        Args:
            batch: With ``image``, uint8, shape (B, 3, H, W), of which only the unknown images remain.
            training: Whether to count the batch for :meth:`end_epoch`.
        """
        keys = _keys(batch["image"])
        known = torch.tensor([key in self._row for key in keys], dtype=torch.bool)
        here, missing = known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)
        if training:
            self._asked, self._found = self._asked + len(keys), self._found + len(here)
        rows = torch.tensor([self._row[keys[place]] for place in here.tolist()], dtype=torch.int64)
        found = {f"known{i}": column[rows] for i, column in enumerate(self._columns)}
        order = torch.cat((here, missing)).argsort()
        mine = {"image": batch["image"][missing], "new_keys": [keys[place] for place in missing.tolist()]}
        return {**batch, **mine, **found, "order": order}

    def complete(self, batch: dict[str, Any], encode: Callable[[Tensor], EncodedImages]) -> EncodedImages:
        """All images of a batch from :meth:`look_up`, by now on the device, in their order.

        Args:
            batch: The batch.
            encode: For those still unknown, uint8, shape (M, 3, H, W); they are known from then on.
        """
        parts = [[batch[name]] for name in ("known0", "known1", "known2") if name in batch] or [[], [], []]
        if len(batch["image"]):
            made = encode(batch["image"])
            self._add(batch["new_keys"], made)
            for part, column in zip(parts, made.columns, strict=True):
                part.append(column)
        return EncodedImages(*(torch.cat(part)[batch["order"]] for part in parts))

    @torch.inference_mode(
        False
    )  # filled in validation too, and a tensor made in that mode could never be written again
    def _add(self, keys: list[int], made: EncodedImages) -> None:
        columns = [column.detach().cpu() for column in made.columns]
        new = {key: place for place, key in enumerate(keys) if key not in self._row}
        if not self._columns:
            self._columns = [column[:0] for column in columns]
        count, total = len(self._row), len(self._row) + len(new)
        if total > len(self._columns[0]):  # doubled, so that filling takes linear time
            size = max(1024, 2 * count, total)
            self._columns = [torch.cat((c[:count], c.new_empty(size - count, *c.shape[1:]))) for c in self._columns]
        places = torch.tensor(list(new.values()), dtype=torch.int64)
        for column, values in zip(self._columns, columns, strict=True):
            column[count:total] = values[places]
        self._row |= {key: count + place for place, key in enumerate(new)}

    def end_epoch(self, *, first: bool) -> None:
        """Say so where the cache saves nothing, and count anew.

        Args:
            first: Whether this process has seen no epoch of training before.
        """
        asked, found = self._asked, self._found
        self._asked = self._found = 0
        if not first and asked and not found:
            logger.warning(
                "cache_features met only images that it had not seen before: either an epoch is a small part of the "
                "data, or the data module augments them; then switch that off, or cache_features"
            )


def _keys(images: Tensor) -> list[int]:
    """A number for each image that follows from its pixels: 64 bits, so that a million images share none."""
    pixels = images.contiguous().numpy()
    return [int.from_bytes(blake2b(image.tobytes(), digest_size=8).digest(), "little") for image in pixels]
