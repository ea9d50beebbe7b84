"""Files that a command writes: refused before the work if they cannot be, and never seen half-written."""

import json
import os
from pathlib import Path

from dtpvit.errors import UserError

__all__ = ["output_file", "write_json", "write_text"]


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


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it: whoever reads sees the old file or the new one.

    Raises:
        OSError: If it cannot be written; the old file then stays.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
