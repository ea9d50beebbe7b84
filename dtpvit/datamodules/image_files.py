"""A training loader of image files: shuffled by epoch, repeated augmentation, resume in mid-epoch."""

import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from dtpvit.datamodules.image_places import Place, read_place
from dtpvit.datamodules.labelled_recipe import DecodedLabel, LabelledImage, RawLabelled
from dtpvit.datamodules.labelled_shards import Sample
from dtpvit.datamodules.resumable import steps_per_epoch
from dtpvit.datamodules.scheduled import Schedule, ScheduledLoader, Substituting

__all__ = ["ImageFileLoader"]


class ImageFileLoader(ScheduledLoader):
    """Images in full batches, equally many on every rank, in an order that is a function of seed and epoch.

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
        max_skipped: As of ``ScheduledLoader``.
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
        max_skipped: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        steps = steps_per_epoch(len(samples), batch_size, world_size)
        layout = {"batch_size": batch_size, "world_size": world_size, "num_images": len(samples)}
        super().__init__(
            _ImageFiles(samples, recipe),
            Schedule(len(samples), steps, batch_size, repeats, seed, rank, world_size),
            num_workers=num_workers,
            fixed=fixed,
            layout=layout | {"repeats": repeats, "seed": seed},
            max_skipped=max_skipped,
        )


class _ImageFiles(Substituting[DecodedLabel]):
    unit = "images"

    def __init__(self, samples: Sequence[Sample], recipe: LabelledImage) -> None:
        # Arrays, for a million small Python objects would be copied into every worker as they are counted.
        self._paths = np.array([os.fsencode(sample.path) for sample in samples])
        self._labels = np.array([sample.label for sample in samples], dtype=np.int64)
        self._recipe = recipe
        self.seed = recipe.seed

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, record: int) -> str:
        return os.fsdecode(self._paths[record])

    def load(self, record: int, epoch: int, repeat: int) -> DecodedLabel:
        path = self.name(record)
        content = read_place(Place(path))
        raw = RawLabelled("/".join(PurePath(path).parts[-2:]), content, int(self._labels[record]))
        return self._recipe.decode(raw, epoch, repeat)

    def collate(self, items: list[DecodedLabel]) -> dict[str, Any]:
        return self._recipe.collate(items)
