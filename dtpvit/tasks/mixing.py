"""Mixup, CutMix and random erasing on a batch, repeatable from its seeds."""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal, TypedDict

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from dtpvit.datamodules.seeding import seeded
from dtpvit.errors import UserError

__all__ = ["Mixing", "MixingOptions", "seed_of_batch"]


class MixingOptions(TypedDict, total=False):
    """Arguments of :class:`Mixing`, as a YAML gives them."""

    mixup: float
    cutmix: float
    prob: float
    switch_prob: float
    mode: Literal["batch", "pair", "elem"]
    erasing: float


def seed_of_batch(seeds: Tensor) -> int:
    """One number below 2**32 that follows from the images' seeds, int64, shape (B,), on the host."""
    return int.from_bytes(blake2b(seeds.numpy().tobytes(), digest_size=4).digest(), "little")


class Mixing:
    """timm's Mixup, CutMix and RandomErasing, on normalised images where they are.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018; Yun et al., "CutMix", 2019; Zhong et al., "Random
    Erasing Data Augmentation", 2020. timm draws from the global generators of Python, numpy and torch; they are
    seeded for the call and put back, so that a step that is repeated repeats its draws.

    Args:
        num_classes: C.
        mixup: Alpha of mixup's beta distribution; 0 leaves it out.
        cutmix: Likewise of CutMix.
        prob: Share of batches (or images, see ``mode``) that are mixed.
        switch_prob: Share of those that CutMix takes, where both are on.
        mode: Whether one draw holds for a ``"batch"``, a ``"pair"`` of images, or an image (``"elem"``).
        smoothing: Label smoothing of the mixed targets.
        erasing: Share of images in which a rectangle is erased, filled with noise.

    Raises:
        UserError: If a number is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Literal["batch", "pair", "elem"] = "batch",
        smoothing: float = 0.0,
        erasing: float = 0.0,
    ) -> None:
        for name, value in {"prob": prob, "switch_prob": switch_prob, "erasing": erasing}.items():
            if not 0 <= value <= 1:
                raise UserError(f"mixing: {name} is {value}; expected a probability, from 0 to 1")
        for name, value in {"mixup": mixup, "cutmix": cutmix}.items():
            if value < 0:
                raise UserError(f"mixing: {name} is {value}; expected at least 0, which leaves it out")
        if mode not in ("batch", "pair", "elem"):
            raise UserError(f"mixing: mode is {mode!r}; expected batch, pair or elem")
        self.erasing = erasing
        self.mixup: Mixup | None = None
        if mixup or cutmix:
            shared = {"prob": prob, "switch_prob": switch_prob, "mode": mode, "label_smoothing": smoothing}
            self.mixup = Mixup(mixup, cutmix, num_classes=num_classes, **shared)

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return self.mixup is not None or self.erasing > 0

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix and erase.

        Args:
            images: Normalised, shape (B, 3, H, W); may be written to.
            labels: int64, shape (B,).
            seed: From :func:`seed_of_batch`.

        Returns:
            The images, and the labels as they are or, mixed, as distributions of shape (B, C). Of an odd number the
            first is mixed with none.
        """
        if not self.active:
            return images, labels
        with seeded(seed, images.device):
            if self.mixup is not None:
                count = len(images)
                if count % 2:
                    # timm pairs images from both ends inwards: the first one, put at the end too, is paired with
                    # itself and stays as it is.
                    images, labels = torch.cat((images, images[:1])), torch.cat((labels, labels[:1]))
                images, labels = self.mixup(images, labels)
                images, labels = images[:count], labels[:count]
            if self.erasing:
                # As timm's own loader: erased last, so that no rectangle is mixed into another image.
                images = RandomErasing(self.erasing, mode="pixel", device=str(images.device))(images)
        return images, labels
