"""Where the images of records lie: in a folder, or in a tar that is read at random."""

import os
import posixpath
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from dtpvit.datamodules.samples import SkippedSample
from dtpvit.datamodules.tars import MOST_BYTES, BrokenTar, index_members
from dtpvit.errors import UserError

__all__ = ["ImageFolder", "ImagePlaces", "ImageTar", "Place", "image_places", "read_place"]


class Place(NamedTuple):
    """Bytes of a file; ``size`` -1 means the whole file."""

    path: str
    offset: int = 0
    size: int = -1


class ImagePlaces(Protocol):
    """Finds the images that records name, opening none."""

    def find(self, name: str) -> Place | None:
        """Where the image lies; None if it is not there."""
        ...


class ImageFolder:
    """Images named by their paths below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # One listing a folder: to ask for each of half a million files takes minutes on a network's disk.
        self._names = lru_cache(maxsize=None)(_listing)

    def find(self, name: str) -> Place | None:
        path = self._folder / name
        return Place(str(path)) if path.name in self._names(str(path.parent)) else None


class ImageTar:
    """Images named by their paths in an uncompressed tar, with or without the one folder that holds all of them.

    Raises:
        UserError: If the tar is damaged or compressed.
    """

    def __init__(self, path: Path) -> None:
        try:
            members = [(posixpath.normpath(name), offset, size) for name, offset, size in index_members(str(path))]
        except BrokenTar as error:
            raise UserError(
                f"{path} is no sound, uncompressed tar ({error}): download it again, or decompress it."
            ) from error
        self._path = str(path)
        self._members = {name: (offset, size) for name, offset, size in members}
        top = _common_folder(self._members)
        self._members = {name.removeprefix(top): place for name, place in self._members.items()} | self._members

    def find(self, name: str) -> Place | None:
        found = self._members.get(posixpath.normpath(name))
        return None if found is None else Place(self._path, *found)


def image_places(images: str | Path) -> ImagePlaces:
    """Images in a folder or a tar.

    Raises:
        UserError: If neither is there, or the tar is damaged or compressed.
    """
    path = Path(images).expanduser()
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file() and path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return ImageTar(path)
    raise UserError(f"{images} is neither a folder nor a .tar: give the folder or tar that the images' names are of.")


def read_place(place: Place) -> bytes:
    """The image's bytes.

    Raises:
        SkippedSample: If they cannot be read, are no file's (a device's would never end), or are more than
            ``MOST_BYTES``.
    """
    try:
        # A pipe without a writer would be waited for.
        with open(os.open(place.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SkippedSample("unreadable file")
            file.seek(place.offset)
            data = file.read(MOST_BYTES + 1 if place.size < 0 else min(place.size, MOST_BYTES + 1))
    except (OSError, ValueError):  # the latter where the name is none that a file can have
        raise SkippedSample("unreadable file") from None
    if len(data) > MOST_BYTES:
        raise SkippedSample("oversized image")
    return data


def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # the latter where the name is none that a file can have
        return frozenset()


def _common_folder(names: Iterable[str]) -> str:
    """``folder/`` if all names begin with it, else nothing."""
    folders = {name.partition("/")[0] if "/" in name else "" for name in names}
    folder = folders.pop() if len(folders) == 1 else ""
    return f"{folder}/" if folder else ""
