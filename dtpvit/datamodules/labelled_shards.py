"""Shards of labelled images (an image and ``.cls`` a sample): which there are, and where in them each image lies."""

import re
from pathlib import Path
from typing import NamedTuple

from dtpvit.datamodules.prompts import load_classnames
from dtpvit.datamodules.shards import expand_shards, is_local
from dtpvit.datamodules.tars import BrokenTar, index_members
from dtpvit.errors import UserError

__all__ = ["IMAGES", "Sample", "index_tar", "labelled_shards", "names_beside"]

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


class Sample(NamedTuple):
    """Where an image lies and what it shows; ``size`` -1 means the whole file."""

    path: str
    label: int
    offset: int = 0
    size: int = -1


def labelled_shards(data: str, *, foreign: bool = False) -> list[str]:
    """The shards that ``data`` names, in order; [] for a folder that holds none.

    Raises:
        UserError: If nothing is there, or, unless ``foreign`` allows them, for compressed shards and those of other
            machines, whose images cannot be read one by one.
    """
    root = Path(data).expanduser()
    if not root.is_dir():
        if is_local(data) and not data.endswith((".tar", ".tar.gz", ".tgz")) and not re.search(r"[{*?\[]", data):
            raise UserError(
                f"{data} is no folder on this machine, nor shards ending in .tar: give the folder of one "
                "split of a labelled data set, or shards such as 'test/{0..9}.tar'."
            )
        shards = expand_shards(data)
        strange = [shard for shard in shards if not is_local(shard) or not shard.endswith(".tar")]
        if strange and not foreign:
            raise UserError(
                f"{strange[0]} is not a .tar file on this machine: evaluation reads labelled images from "
                "folders or from local, uncompressed tars, so download or unpack it."
            )
        return shards
    for folder in (root, root / "test"):
        shards = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
        promise = folder / "nshards.txt"
        if promise.is_file() and (promised := promise.read_text().strip()) != str(len(shards)):
            raise UserError(
                f"{folder} holds {len(shards)} shards where its nshards.txt says {promised}: finish the download."
            )
        if shards:
            return [str(shard) for shard in shards]
    return []


def names_beside(shard: str) -> list[str] | None:
    """Class names from the ``classnames.txt`` in the shard's folder or in the one above, if there is one."""
    beside = (folder / "classnames.txt" for folder in Path(shard).parents[:2])
    return next((load_classnames(str(file)) for file in beside if file.is_file()), None)


def index_tar(shard: str) -> tuple[list[Sample], int]:
    """Samples of one local, uncompressed shard, in the order of their images, and how many were incomplete.

    Raises:
        UserError: If the tar is damaged or a label is no whole number.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    keys: set[str] = set()
    try:
        with open(shard, "rb") as file:
            for name, offset, size in index_members(shard):
                folder, _, base = name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not stem or not dot:
                    continue
                key = f"{folder}/{stem}"
                keys.add(key)
                if f".{extension.lower()}" in IMAGES:
                    images[key] = (offset, size)
                elif extension == "cls":
                    file.seek(offset)
                    labels[key] = int(file.read(size))
    except (BrokenTar, OSError, ValueError) as error:
        raise UserError(
            f"{shard} is no sound, uncompressed tar with whole numbers as labels ({error}): download it again."
        ) from error
    complete = [key for key in images if key in labels]
    return [Sample(shard, labels[key], *images[key]) for key in complete], len(keys) - len(complete)
