"""Batches of labelled images for evaluation: every image once, in order, broken ones left out and counted."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dtpvit.datamodules.image_places import Place, read_place
from dtpvit.datamodules.labelled_index import LabelledIndex, Sample, index_labelled
from dtpvit.datamodules.samples import SkippedSample, decode_image
from dtpvit.datamodules.worker_signals import obey_parent_alone, started
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform

__all__ = ["LabelledLoader", "check_batching", "labelled_loader"]


class LabelledLoader:
    """Iterable of ``{"image": uint8 (B, 3, H, W), "label": int64 (B,)}``; every sample once over all ranks.

    Not a DataLoader, on purpose: under a distributed strategy Lightning would put its own sampler into one,
    which splits the data a second time and pads it with repeats.

    Args:
        index: What to load, all ranks together.
        image_size: Height and width that the evaluation transform makes.
        batch_size: Images of a batch; the last one may be short.
        num_workers: Processes that decode; 0 decodes in this one.
        resize_mode, crop_pct, interpolation: As in ``eval_transform``.
        rank: This process among ``world_size``; it loads samples ``rank, rank + world_size, ...``

    Attributes:
        class_indices: As in the index.
        skipped: Samples that could not be read, counted since the current or last iteration began.
        broken: Which these were, the first hundred of them.
    """

    def __init__(
        self,
        index: LabelledIndex,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        num_workers: int = 2,
        resize_mode: str = "shortest",
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_batching(batch_size, num_workers)
        self.index = index
        self.class_indices = index.class_indices
        # Shard samples without a label belong to no rank; the first one counts them, so that sums come right.
        self._incomplete = index.incomplete if rank == 0 else 0
        self.skipped = 0
        self.broken: list[str] = []
        transform = eval_transform(image_size, resize_mode=resize_mode, crop_pct=crop_pct, interpolation=interpolation)
        self._loader = DataLoader(
            _Images(index.samples[rank::world_size], transform),
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=obey_parent_alone,
            collate_fn=_Collate(image_size),
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        """Batches of this rank; fewer come out only where every image of a batch is broken."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.skipped, self.broken = self._incomplete, []
        for batch in started(self._loader):
            broken = batch.pop("broken")
            self.skipped += len(broken)
            self.broken = (self.broken + broken)[:100]
            if len(batch["label"]):
                yield batch


def check_batching(batch_size: int, num_workers: int) -> None:
    """Refuse numbers that no loader can work with, by a UserError."""
    if batch_size < 1 or num_workers < 0:
        raise UserError(
            f"The batch size is {batch_size} and the number of workers {num_workers}: give at least 1 and at least 0."
        )


def labelled_loader(
    data: str,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    num_workers: int = 2,
    classnames: list[str] | None = None,
    labels: str = "auto",
    limit: int | None = None,
    resize_mode: str = "shortest",
    rank: int = 0,
    world_size: int = 1,
) -> LabelledLoader:
    """``index_labelled``, and a ``LabelledLoader`` over what it found; the arguments are theirs."""
    return LabelledLoader(
        index_labelled(data, classnames=classnames, labels=labels, limit=limit),
        image_size=image_size,
        batch_size=batch_size,
        num_workers=num_workers,
        resize_mode=resize_mode,
        rank=rank,
        world_size=world_size,
    )


class _Images(Dataset[tuple[Tensor | None, Sample]]):
    def __init__(self, samples: list[Sample], transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Sample]:
        sample = self.samples[index]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on EXIF and palettes concern nobody here
            try:
                # As in timm and torchvision an EXIF orientation is not heeded.
                image = decode_image(read_place(Place(sample.path, sample.offset, sample.size)), upright=False)
            except SkippedSample:
                return None, sample
        return self.transform(image), sample


@dataclass(frozen=True)
class _Collate:
    image_size: tuple[int, int]

    def __call__(self, items: list[tuple[Tensor | None, Sample]]) -> dict[str, Tensor | list[str]]:
        images = [image for image, _ in items if image is not None]
        labels = [sample.label for image, sample in items if image is not None]
        broken = [f"{s.path}@{s.offset}" if s.size >= 0 else s.path for image, s in items if image is None]
        stacked = torch.stack(images) if images else torch.empty(0, 3, *self.image_size, dtype=torch.uint8)
        return {"image": stacked, "label": torch.tensor(labels, dtype=torch.int64), "broken": broken}
