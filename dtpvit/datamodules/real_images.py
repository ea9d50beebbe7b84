"""A handful of real images, and captions where they have some, from wherever they lie."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dtpvit.datamodules.image_places import Place, read_place
from dtpvit.datamodules.samples import IMAGE_ENDINGS, SkippedSample, decode_image, read_samples
from dtpvit.datamodules.shards import expand_shards
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import EvalTransform

__all__ = ["real_images"]


def real_images(
    source: str, count: int, transform: EvalTransform, *, least: int | None = None
) -> tuple[Tensor, list[str]]:
    """The first samples of shards, or images spread evenly over a folder and all folders below it.

    Args:
        source: An image file, a folder of images, or shards (a folder of tars, a brace list, a glob).
        count: How many are wanted; what cannot be read is passed over.
        transform: Brings them to size.
        least: How many will do; None is ``count``.

    Returns:
        uint8, shape (count, 3, H, W), or fewer; and the captions of those that have one.

    Raises:
        UserError: If fewer are there.
    """
    folder = Path(source).expanduser()
    is_image = folder.is_file() and _is_image(folder)
    if _is_image(folder) and not folder.exists():
        raise UserError(f"there is no image {source}; give images, a folder of them, or shards")
    files = _image_files(folder) if folder.is_dir() else [folder] if is_image else []
    other_file = folder.is_file() and not is_image and folder.suffix not in (".tar", ".gz", ".tgz")
    if other_file or (folder.is_dir() and not files and not any(folder.rglob("*.tar*"))):
        raise UserError(f"{source} holds neither images nor tar shards; give a folder of images, or shards")
    images, captions = list[Tensor](), list[str]()
    for data, caption in _from_files(files, count) if files else _from_shards(source):
        try:
            images.append(transform(decode_image(data)))
        except SkippedSample:
            continue
        if caption:
            captions.append(caption)
        if len(images) == count:
            return torch.stack(images), captions
    if least is not None and len(images) >= least:
        return torch.stack(images), captions
    raise UserError(f"{source} has {len(images)} images that can be read; {least or count} are wanted")


def _image_files(folder: Path) -> list[Path]:
    found = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_ENDINGS


def _from_files(files: list[Path], count: int) -> Iterator[tuple[bytes, str]]:
    step = max(1, len(files) // count)
    first = files[::step]
    for path in [*first, *sorted(set(files) - set(first))]:
        try:
            yield read_place(Place(str(path))), ""
        except SkippedSample:  # a dangling link, or not ours to read
            continue


def _from_shards(source: str) -> Iterator[tuple[bytes, str]]:
    for shard in expand_shards(source):
        for _, parts in read_samples(shard, lambda cause, where: None):
            image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
            if image:
                yield image, parts.get("txt", b"").decode("utf-8", "replace").strip()
