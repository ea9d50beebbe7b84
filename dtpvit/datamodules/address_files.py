"""Address lists on disk, as img2dataset reads them, and how many addresses they hold."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from dtpvit.datamodules.address_lists import AddressList
from dtpvit.errors import UserError

__all__ = ["address_files", "prepared_list"]

_COUNT_ROWS = "import sys, pyarrow.parquet as p; print(*(p.read_metadata(f).num_rows for f in sys.argv[1:]))"


def address_files(path: Path, known: AddressList) -> list[Path]:
    """The files of a list: one tsv, one parquet, or all parquet files of a folder, in img2dataset's order.

    Raises:
        UserError: If there are none.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"There is no address list at {path}: get it from {known.source}, or give --addresses FILE.")
    if files[0].suffix not in (".tsv", ".parquet"):
        raise UserError(f"{files[0]} is neither .tsv nor .parquet: give --addresses a list of such a form.")
    return files


def prepared_list(files: list[Path], folder: Path, known: AddressList, program: str) -> tuple[Path, list[int]]:
    """What img2dataset is to read, and the number of addresses of each file.

    A tsv is copied into ``folder`` as ``addresses.tsv``, with the header that img2dataset needs and quotation marks
    such that it reads the captions as they are.

    Raises:
        UserError: If the list cannot be read, or holds no addresses.
    """
    if files[0].suffix == ".tsv":
        source = folder / "addresses.tsv"
        numbers = [_copy(files[0], source, known)]
    else:
        source = files[0] if len(files) == 1 else files[0].parent
        numbers = _count_rows(files, program)
    if not sum(numbers):
        raise UserError(
            f"{files[0]} holds no addresses: expected lines of an address and a caption with a tab between."
        )
    return source, numbers


def _copy(original: Path, target: Path, known: AddressList) -> int:
    written = left_out = 0
    partial = target.with_name(f"{target.name}.partial")
    with (
        original.open(encoding="utf-8", errors="replace", newline="\n") as lines,
        partial.open("w", encoding="utf-8", newline="") as copy,
    ):
        rows = csv.writer(copy, delimiter="\t", lineterminator="\n")
        rows.writerow([known.url, known.caption])
        for pair in _pairs(lines, known):
            if pair is None:
                left_out += 1
            else:
                rows.writerow(pair)
                written += 1
    partial.replace(target)
    if left_out:
        print(f"dtpvit: left out {left_out:,} lines of {original} that are no address and caption", file=sys.stderr)
    return written


def _pairs(lines: Iterator[str], known: AddressList) -> Iterator[tuple[str, str] | None]:
    """(address, caption) of each line, whichever comes first in it; None for a line that is none."""
    first = next(lines, "")
    header = first.strip("\r\n").split("\t") == [known.url, known.caption]
    for line in lines if header else chain([first] if first else [], lines):
        fields = line.rstrip("\r\n").replace("\r", " ").split("\t")  # img2dataset's reader ends lines at any \r
        if len(fields) == 2 and not fields[0].startswith("http"):
            fields.reverse()
        address = fields[0].strip()
        yield (address, fields[1].strip()) if len(fields) == 2 and address.startswith("http") else None


def _count_rows(files: list[Path], program: str) -> list[int]:
    """Rows of parquet files, counted by the Python that img2dataset runs in, which has pyarrow."""
    with open(program, encoding="utf-8", errors="replace") as script:
        python = script.readline().removeprefix("#!").strip()
    if "python" not in python:
        python = str(Path(program).parent / "python")
    command = [python, "-c", _COUNT_ROWS, *map(str, files)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [int(number) for number in said.split()]
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        raise UserError(
            f"The rows of {files[0]} cannot be counted ({''.join(detail)}): expected parquet files."
        ) from None
