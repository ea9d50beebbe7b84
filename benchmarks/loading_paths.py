"""The two ways from shards to batches that ``benchmarks.loading`` compares, each as a whole and in stages."""

import importlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any, Protocol

import open_clip
import torch
import webdataset as wds
from open_clip.transform import image_transform
from torch import Tensor
from webdataset.tariterators import tar_file_expander

from dtpvit.datamodules.image_text import ImageTextShards
from dtpvit.datamodules.samples import ImageText, captions_of, decode_pixels
from dtpvit.datamodules.transforms import train_transform

__all__ = ["MODEL", "STAGES", "Lane", "OpenClip", "Ours"]

MODEL = "ViT-B-32"  # whose tokenizer both use
STAGES = ("read tar", "decode", "crop and resize", "to tensor, normalise", "tokenise", "collate")
Work = Callable[[], Any]


def _open_clip_data() -> ModuleType:
    """``open_clip_train.data``, made to work where pandas is missing (only its CSV sets use it) or webdataset is new.

    Newer versions of webdataset mark the end of a shard with an empty sample, at which open_clip's grouping fails.
    """
    missing = importlib.util.find_spec("pandas") is None
    if missing:
        sys.modules["pandas"] = ModuleType("pandas")
    try:
        module: Any = importlib.import_module("open_clip_train.data")
        if "eof_value" in signature(tar_file_expander).parameters:
            module.tar_file_expander = partial(tar_file_expander, eof_value=None)
        return module
    finally:
        if missing:
            del sys.modules["pandas"]


_data = _open_clip_data()


class Lane(Protocol):
    """One way to load. Images are counted as delivered, in full batches."""

    name: str

    def batches(self, workers: int) -> Iterator[Tensor]:
        """The images of one epoch, batch by batch, from opening the first shard on."""
        ...

    def stages(self, count: int) -> dict[str, Work]:
        """The work of each stage on the first ``count`` samples, in order: each stage uses the last's result."""
        ...

    def transform(self, count: int) -> Work:
        """From JPEG bytes in memory to the sample's tensor, for the first ``count`` samples."""
        ...


class Ours:
    """``ImageTextShards`` as a training run uses it."""

    name = "dtpvit"

    def __init__(self, shards: list[str], image_size: int, batch_size: int) -> None:
        self.shards, self.image_size, self.batch_size = shards, image_size, batch_size
        self.tokenize = open_clip.get_tokenizer(MODEL)

    def batches(self, workers: int) -> Iterator[Tensor]:
        data = ImageTextShards(
            train=self.shards,
            batch_size=self.batch_size,
            num_workers=workers,
            image_size=self.image_size,
            tokenize=self.tokenize,
        )
        data.setup("fit")
        for batch in data.train_dataloader():
            yield batch["image"]

    def stages(self, count: int) -> dict[str, Work]:
        # A new recipe each time: no caption is known yet, as in the first epoch.
        recipe, kept = self._recipe(), dict[str, Any]()

        def read() -> None:
            kept["raw"] = _first(count, (raw for shard in self.shards for raw in recipe.read(shard, _fail)))

        def decode() -> None:
            kept["pixels"] = [decode_pixels(raw.image, recipe.transform.min_side) for raw in kept["raw"]]

        def crop() -> None:
            kept["images"] = [recipe.transform(pixels, seed) for seed, pixels in enumerate(kept["pixels"])]

        def tokenise() -> None:
            captions = [captions_of(raw, recipe.captions_field)[0] for raw in kept["raw"]]
            kept["rows"] = [recipe.tokenize(part) for part in _parts(captions, self.batch_size)]

        def collate() -> None:
            for images in _parts(kept["images"], self.batch_size):
                torch.stack(images)

        return dict(zip(STAGES, (read, decode, crop, _nothing, tokenise, collate), strict=True))

    def transform(self, count: int) -> Work:
        recipe = self._recipe()
        raws = _first(count, (raw for shard in self.shards for raw in recipe.read(shard, _fail)))
        return lambda: [
            recipe.transform(decode_pixels(raw.image, recipe.transform.min_side), seed) for seed, raw in enumerate(raws)
        ]

    def _recipe(self) -> ImageText:
        return ImageText(train_transform(self.image_size), self.tokenize)


class OpenClip:
    """open_clip's own ``get_wds_dataset`` and its default training transform."""

    name = "open_clip"

    def __init__(self, shards: list[str], image_size: int, batch_size: int, num_samples: int) -> None:
        self.shards, self.batch_size, self.num_samples = shards, batch_size, num_samples
        self.image = image_transform(image_size, is_train=True)
        self.tokenize = open_clip.get_tokenizer(MODEL)

    def batches(self, workers: int) -> Iterator[Tensor]:
        args = Namespace(
            train_data="::".join(self.shards),
            train_num_samples=self.num_samples,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            batch_size=self.batch_size,
            workers=workers,
            world_size=1,
        )
        # Rounded down as ours is: rounded up, it would read the first shards a second time for the last batch.
        data = _data.get_wds_dataset(args, self.image, is_train=True, floor=True, tokenizer=self.tokenize)
        for images, _ in data.dataloader:
            yield images

    def stages(self, count: int) -> dict[str, Work]:
        crop, convert, tensor, normalise = self.image.transforms
        kept: dict[str, Any] = {}

        def read() -> None:
            kept["raw"] = self._read(count)

        def decode() -> None:
            kept["pil"] = list(_decoded(kept["raw"]))

        def resize() -> None:
            kept["small"] = [convert(crop(sample["jpg"])) for sample in kept["pil"]]

        def to_tensor() -> None:
            kept["images"] = [normalise(tensor(image)) for image in kept["small"]]

        def tokenise() -> None:
            kept["rows"] = [self.tokenize(sample["txt"])[0] for sample in kept["pil"]]

        def collate() -> None:
            for _ in wds.batched(self.batch_size)(zip(kept["images"], kept["rows"], strict=True)):
                pass

        return dict(zip(STAGES, (read, decode, resize, to_tensor, tokenise, collate), strict=True))

    def transform(self, count: int) -> Work:
        raws = [{"__key__": raw["__key__"], "jpg": raw["jpg"]} for raw in self._read(count)]
        return lambda: [self.image(sample["jpg"]) for sample in _decoded(raws)]

    def _read(self, count: int) -> list[dict[str, Any]]:
        return _first(count, _data.tarfile_to_samples_nothrow([{"url": shard} for shard in self.shards]))


# open_clip logs and skips broken images; here they must not make the comparison uneven.
_decoded = wds.decode("pilrgb", handler=wds.reraise_exception)


def _first(count: int, samples: Iterator[Any]) -> list[Any]:
    found = []
    for sample in samples:
        found.append(sample)
        if len(found) == count:
            break
    return found


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _fail(cause: str) -> None:
    raise ValueError(f"These shards hold a sample that cannot be compared: {cause}.")


def _nothing() -> None:
    """Pixels stay uint8: they are normalised on the device."""
