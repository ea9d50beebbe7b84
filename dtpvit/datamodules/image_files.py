"""A training loader of image files: shuffled by epoch, repeated augmentation, resume in mid-epoch."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dtpvit.datamodules.labelled_recipe import DecodedLabel, LabelledImage, RawLabelled
from dtpvit.datamodules.labelled_shards import Sample
from dtpvit.datamodules.resumable import Resumable, steps_per_epoch
from dtpvit.datamodules.samples import SkippedSample, sample_seed
from dtpvit.errors import UserError

__all__ = ["ImageFileLoader"]

_TRIES = 100


class ImageFileLoader(Resumable):
    """Full batches, equally many on every rank, in an order that is a function of seed and epoch.

    The images are shuffled over all ranks, and each of an epoch's batches is dealt out to the ranks in turn; what fills
    no batch is left out, other images in every epoch. With ``repeats`` each image occurs that often in a row (Hoffer
    et al., "Augment your batch: improving generalization through instance repetition", 2020), as by timm's
    ``RepeatAugSampler``: ranks get different augmentations of the same images, and an epoch stays as long, with
    accordingly fewer images.

    In place of an image that cannot be read comes another of the data set, which one being a function of seed, epoch
    and the broken one. A resume is exact with any number of workers, if batch size, ranks, images, repeats and seed are
    the same.

    Args:
        samples: Whole files and their labels.
        recipe: Decodes, augments and collates.
        batch_size: Per rank.
        num_workers: Worker processes; 0 loads in this process.
        repeats: How often an image occurs in its epoch.
        fixed: Every epoch is as the first, order and augmentation.
        seed: Of the order and, through the recipe, of augmentation.
        rank, world_size: Of this process; never read from the environment.

    Attributes:
        skipped: Reads that failed since the present epoch's iteration began, by cause, on this rank.

    Raises:
        UserError: If there is no full batch for every rank; while iterating, if nothing can be read.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        recipe: LabelledImage,
        *,
        batch_size: int,
        num_workers: int = 0,
        repeats: int = 1,
        fixed: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self.steps: int = steps_per_epoch(len(samples), batch_size, world_size)
        self.skipped: dict[str, int] = {}
        self._fixed = fixed
        self._schedule = _Schedule(len(samples), self.steps, batch_size, repeats, seed, rank, world_size)
        self._start_epoch(0)
        self._loader = DataLoader(
            _ImageFiles(samples, recipe),
            batch_size=None,
            sampler=self._schedule,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: worker seeds drawn from the global one would change the model's randomness.
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        """Batches of this rank per epoch."""
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The epoch's batches, or after ``load_state_dict`` the rest of them.

        Nothing happens before the first batch is asked for: Lightning calls ``iter`` ahead of ``set_epoch``.
        """
        if not self._resuming:
            self._start_epoch(self._epoch)
        self._resuming = False
        skipped: Counter[str] = Counter()
        self.skipped = skipped
        schedule = self._schedule
        schedule.epoch, schedule.position, schedule.salt = 0 if self._fixed else self._epoch, self._position, self._salt
        for batch, causes in self._loader:
            if isinstance(batch, str):
                # Now, for the garbage collector may close their queues first and then wait for them in vain.
                self._stop_workers()
                raise UserError(batch)
            skipped.update(causes)
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position in plain Python, the same on every rank."""
        return {"epoch": self._epoch, "position": self._position, "salt": self._salt, "layout": self._layout()}

    def _layout(self) -> dict[str, int]:
        schedule = self._schedule
        return {
            "batch_size": self.batch_size,
            "world_size": schedule.world_size,
            "num_images": schedule.num_images,
            "repeats": schedule.repeats,
            "seed": schedule.seed,
        }


class _Draws(NamedTuple):
    """A batch to be made: which images, and for the how manieth time each."""

    epoch: int
    images: list[int]
    repeats: list[int]


@dataclass
class _Schedule(Sampler[_Draws]):
    """What is to be in each batch of this rank, from a position on."""

    num_images: int
    steps: int
    batch_size: int
    repeats: int
    seed: int
    rank: int
    world_size: int
    epoch: int = 0
    position: int = 0
    salt: int = 0

    def __iter__(self) -> Iterator[_Draws]:
        shuffle = torch.Generator().manual_seed(sample_seed(f"order {self.salt}", self.epoch, self.seed))
        order = torch.randperm(self.num_images, generator=shuffle).numpy()
        whole = self.batch_size * self.world_size
        for step in range(self.position, self.steps):
            places = np.arange(step * whole + self.rank, (step + 1) * whole, self.world_size)
            yield _Draws(self.epoch, order[places // self.repeats].tolist(), (places % self.repeats).tolist())


class _ImageFiles(Dataset[tuple[Any, dict[str, int]]]):
    """The part of the loader that lives in the workers: whole batches, and what was skipped on the way.

    A batch that is a string is an error's sentence: raised here, a worker's traceback would bury it.
    """

    def __init__(self, samples: Sequence[Sample], recipe: LabelledImage) -> None:
        # Arrays, for a million small Python objects would be copied into every worker as they are counted.
        self._paths = np.array([os.fsencode(sample.path) for sample in samples])
        self._labels = np.array([sample.label for sample in samples], dtype=np.int64)
        self._recipe = recipe

    def __getitem__(self, draws: _Draws) -> tuple[Any, dict[str, int]]:
        skipped: Counter[str] = Counter()
        try:
            samples = [
                self._sample(image, repeat, draws.epoch, skipped)
                for image, repeat in zip(draws.images, draws.repeats, strict=True)
            ]
        except UserError as error:
            return str(error), dict(skipped)
        return self._recipe.collate(samples), dict(skipped)

    def _sample(self, image: int, repeat: int, epoch: int, skipped: Counter[str]) -> DecodedLabel:
        """The image, or the first readable one of those that take its place."""
        others = Random(f"{self._recipe.seed}-{epoch}-{image}")
        path = wanted = os.fsdecode(self._paths[image])
        for _ in range(_TRIES):
            try:
                return self._recipe.decode(self._read(path, int(self._labels[image])), epoch, repeat)
            except SkippedSample as broken:
                skipped[broken.cause] += 1
            image = others.randrange(len(self._paths))
            path = os.fsdecode(self._paths[image])
        causes = ", ".join(f"{cause}: {count}" for cause, count in skipped.items())
        raise UserError(
            f"Neither {wanted} nor any of {_TRIES - 1} images tried in its place could be used ({causes} in this "
            "batch); check that the images are whole and readable."
        )

    @staticmethod
    def _read(path: str, label: int) -> RawLabelled:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            raise SkippedSample("unreadable file") from None
        return RawLabelled("/".join(PurePath(path).parts[-2:]), content, label)
