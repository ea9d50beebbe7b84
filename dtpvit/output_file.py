"""Files that a command writes: refused before the work if they cannot be, and never seen half-written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dtpvit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PARTIAL", "named", "output_file", "write_json", "write_picture", "write_text", "written_beside"]

PARTIAL = ".partial"
"""What the name of a file ends in as long as it is being written."""


def output_file(output: str | None) -> Path | None:
    """The file to write, or None.

    Raises:
        UserError: If it cannot be written.
    """
    if output is None:
        return None
    path = Path(output).expanduser()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            f"The result cannot be written to {output}: give a file in a folder that exists and can be written to."
        )
    return path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; the file there is flushed to the disk and takes the name afterwards.

    Whoever reads, and whatever happens to the process or the machine, sees the old file or the new one. If the
    writing fails, what there is of it is removed; after a kill it stays until the next try. What is no file, such as
    /dev/stdout, is written to as it is.

    Raises:
        OSError: If it cannot be written, flushed or renamed; the old file then stays.
    """
    if path.exists() and not path.is_file():
        with named(path):
            yield path
        return
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with named(path):
            yield partial
            _flush(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    with suppress(OSError):  # some network file systems know no flush of folders
        _flush(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in an OSError, which says what it was only where it could not be opened."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it: whoever reads sees the old file or the new one.

    Names of files need not be text; what is none in them becomes "?".

    Raises:
        OSError: If it cannot be written; the old file then stays.
    """
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_picture(path: Path, picture: "Image.Image") -> None:
    """Write a picture, of the kind that ``path`` ends in, see :func:`write_text`."""
    from PIL import Image

    with written_beside(path) as partial:
        # PNG, having no loss, leaves the quality aside.
        picture.save(partial, Image.registered_extensions()[path.suffix.lower()], quality=90)
