"""From a shard's or file's bytes to batches of augmented labelled images."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtpvit.datamodules.augment import Augmentation, Unaugmented
from dtpvit.datamodules.samples import IMAGE_ENDINGS, Skip, SkippedSample, decode_image, read_samples, sample_seed
from dtpvit.errors import UserError

__all__ = ["DecodedLabel", "LabelledImage", "RawLabelled", "check_label"]


class RawLabelled(NamedTuple):
    """One labelled image as it is stored. ``key`` does not depend on where the data set lies."""

    key: str
    image: bytes
    label: int


class DecodedLabel(NamedTuple):
    """One sample ready for its batch; ``image`` is uint8 (3, H, W)."""

    image: Tensor
    label: int
    seed: int
    key: str


class LabelledImage:
    """How a labelled image is read, decoded and collated; picklable, one per worker.

    Args:
        transform: Given the sample's own seed.
        num_classes: Labels lie below this.
        seed: The run's seed.
    """

    def __init__(self, transform: Augmentation | Unaugmented, num_classes: int, seed: int = 0) -> None:
        self.transform = transform
        self.num_classes = num_classes
        self.seed = seed

    def read(self, shard: str, skip: Skip) -> Iterator[RawLabelled]:
        """The samples of a shard that have an image and a ``.cls``, undecoded.

        Raises:
            UserError: If a label is no whole number or none of the classes: the run's numbers would be worthless.
        """
        for key, parts in read_samples(shard, skip):
            image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
            if not image:
                skip("no image", key)
            elif not parts.get("cls", b"").strip():
                skip("no label", key)
            else:
                yield RawLabelled(key, image, _label(parts["cls"], key, self.num_classes))

    def decode(self, raw: RawLabelled, epoch: int, repeat: int = 0) -> DecodedLabel:
        """Pixels that are a function of key, epoch, run's seed and ``repeat``, wherever they are made.

        As in timm and torchvision, and in our evaluation, an EXIF orientation is not heeded.

        Raises:
            SkippedSample: If the image is broken.
        """
        seed = sample_seed(f"{raw.key}|{repeat}" if repeat else raw.key, epoch, self.seed)
        image = decode_image(raw.image, upright=False)
        if not self.transform.fits(image):
            raise SkippedSample("broken image")
        return DecodedLabel(self.transform(image, seed), raw.label, seed, raw.key)

    def collate(self, samples: list[DecodedLabel]) -> dict[str, Any]:
        """{"image": uint8 (B, 3, H, W), "label": int64 (B,), "seed": int64 (B,), "key": B names}."""
        return {
            "image": torch.stack([sample.image for sample in samples]),
            "label": torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            "seed": torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
            "key": [sample.key for sample in samples],
        }


def check_label(label: int, where: str, num_classes: int) -> None:
    """Refuse a label that is none of the classes, by a UserError."""
    if not 0 <= label < num_classes:
        raise UserError(
            f"{where} has the label {label} where {num_classes} classes allow 0 to {num_classes - 1}: "
            "give a model of as many classes as the data have, or other data."
        )


def _label(content: bytes, key: str, num_classes: int) -> int:
    try:
        label = int(content)
    except ValueError:
        raise UserError(
            f"{key}.cls holds {content[:40]!r} where the whole number of a class was expected: write the shards anew."
        ) from None
    check_label(label, f"{key}.cls", num_classes)
    return label
