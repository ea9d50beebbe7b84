"""``dtpvit data count``: how many addresses became usable samples, and what became of the others."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dtpvit.datamodules.shard_survey import LOST, OF_SAMPLES, ShardSurvey, survey_shard, survey_shards
from dtpvit.datamodules.shards import is_local, named_shards, shard_stats
from dtpvit.errors import UserError
from dtpvit.json_input import parse_json
from dtpvit.output_file import output_file, write_json

__all__ = ["cause_of_status", "count", "out_of"]

_NAMED = 5  # shards, before "and 7 more"
_ROWS = 12  # causes
_CAUSES = (
    (r"HTTP Error (\d+)", r"HTTP \1"),
    (r"timed? ?out", "timed out"),
    (r"Errno -\d|Name or service not known|nodename|label empty or too long", "host not found"),
    (r"\bSSL\b|CERTIFICATE", "certificate refused"),
    (r"Errno 1(01|04|10|11|13)|[Cc]onnection (refused|reset|aborted)|Remote end closed", "connection refused or lost"),
    (r"IncompleteRead", "answer cut off"),
    (r"X-Robots-Tag", "refused by X-Robots-Tag"),
    (r"[Dd]ecod", "not an image, or a broken one"),
)


def count(
    shards: list[str], deep: bool = False, workers: int | None = None, out: str | None = None, json: str | None = None
) -> None:
    """Count usable samples, and say why the other addresses gave none.

    The numbers are img2dataset's, from the ``_stats.json`` beside each shard; with ``--deep`` they are those of the
    shards themselves. Either way each shard's usable samples go into a ``sizes.json`` beside the shards, as open_clip
    writes it, where training finds the size of shards that have no ``_stats.json``.

    Args:
        shards: Folders, brace lists or globs of shards.
        deep: Read every shard: samples without image or caption, duplicates and damage are found, and shards without a
            ``_stats.json`` are counted. Images are not decoded; ``dtpvit data check`` does that.
        workers: Processes that read with ``--deep``; one for each core if not given.
        out: Another place for the sizes.json.
        json: JSON file for everything that was counted.

    Raises:
        UserError: If no shard is there, or none can be counted.
    """
    report, sizes_file = output_file(json), output_file(out)
    named = named_shards(shards)
    tally = _Tally(deep)
    if deep:
        for survey in survey_shards(named, partial(survey_shard, decode=False), workers):
            tally.add(survey.shard, shard_stats(survey.shard), survey)
    else:
        for shard in named:
            tally.add(shard, shard_stats(shard), None)
    if not tally.sizes:
        raise UserError(
            f"None of the {len(named)} shards, the first being {named[0]!r}, has a _stats.json of img2dataset: "
            "give --deep to read the shards themselves."
        )
    _show(tally)
    _write_sizes(tally.sizes, sizes_file)
    if report is not None:
        write_json(report, tally.record(len(named)))


@dataclass
class _Tally:
    """Sums over shards: ``sizes`` usable samples by shard, ``causes`` of the rest, ``statuses`` as img2dataset says."""

    deep: bool
    addresses: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    causes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)

    @property
    def usable(self) -> int:
        return sum(self.sizes.values())

    def add(self, shard: str, stats: dict[str, Any] | None, survey: ShardSurvey | None) -> None:
        """Count one shard; without ``_stats.json`` and without having been read it is only named."""
        if stats is None:
            self.unknown.append(shard)
        else:
            self.addresses += stats["count"]
            failed = {status: number for status, number in stats["status_dict"].items() if status != "success"}
            self.statuses.update(failed)
            for status, number in failed.items():
                self.causes[cause_of_status(status)] += number
        if survey is not None:
            self._add_survey(survey, None if stats is None else stats["successes"])
        elif stats is not None:
            self.sizes[shard] = stats["successes"]

    def _add_survey(self, survey: ShardSurvey, promised: int | None) -> None:
        self.sizes[survey.shard] = survey.usable
        found = Counter(fault.cause for fault in survey.faults)
        self.causes.update({cause: found[cause] for cause in OF_SAMPLES if found[cause]})
        self.statuses.update({cause: found[cause] for cause in ("duplicate key", "unreadable shard") if found[cause]})
        if promised is None:
            self.addresses += len(survey.keys)
        elif lost := promised - len(survey.keys):
            self.causes[LOST] += lost

    def record(self, shards: int) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "command": shlex.join(["dtpvit", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "deep": self.deep,
            "shards": shards,
            "addresses": self.addresses,
            "usable": self.usable,
            "causes": dict(self.causes.most_common()),
            "statuses": dict(self.statuses.most_common()),
            "without_stats": self.unknown,
            "sizes": self.sizes,
        }


def cause_of_status(status: str) -> str:
    """img2dataset's error message without what differs from address to address.

    >>> cause_of_status("<urlopen error [Errno -2] Name or service not known>"), cause_of_status("HTTP Error 404: gone")
    ('host not found', 'HTTP 404')
    """
    for pattern, cause in _CAUSES:
        if match := re.search(pattern, status):
            return match.expand(cause)
    return status if len(status) <= 60 else f"{status[:59]}…"


def out_of(part: int, whole: int) -> str:
    """How many of how many, in millions where there are millions.

    >>> out_of(6_912_345, 12_423_374), out_of(1990, 2000)
    ('6.9 of 12.4 million', '1,990 of 2,000')
    """
    return f"{part / 1e6:.1f} of {whole / 1e6:.1f} million" if whole >= 1_000_000 else f"{part:,} of {whole:,}"


def _show(tally: _Tally) -> None:
    what = "addresses" if not tally.unknown or not tally.deep else "addresses and samples"
    share = 100 * tally.usable / max(1, tally.addresses)
    print(f"{out_of(tally.usable, tally.addresses)} {what} are usable ({share:.3g} %), in {len(tally.sizes):,} shards.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column(what, justify="right")
    table.add_column("%", justify="right")
    rows = tally.causes.most_common()
    if len(rows) > _ROWS:
        rows = [*rows[:_ROWS], (f"{len(rows) - _ROWS} other causes", sum(n for _, n in rows[_ROWS:]))]
    for cause, number in [("usable", tally.usable), *rows]:
        table.add_row(Text(cause), f"{number:,}", f"{100 * number / max(1, tally.addresses):.2f}")
    Console().print(table)
    for cause in ("duplicate key", "unreadable shard") if tally.deep else ():
        if tally.statuses[cause]:
            print(f"{cause}: {tally.statuses[cause]:,}, named by `dtpvit data check`.")
    if tally.unknown:
        names = ", ".join(Path(shard).name for shard in tally.unknown[:_NAMED])
        more = f" and {len(tally.unknown) - _NAMED} more" if len(tally.unknown) > _NAMED else ""
        counted = "were counted by reading them" if tally.deep else "are not counted; --deep reads them"
        print(f"Without a _stats.json, for which the download may be unfinished: {names}{more}; they {counted}.")


def _write_sizes(sizes: dict[str, int], target: Path | None) -> None:
    """One ``{name of the shard: usable samples}`` a folder, into which a part of a folder's shards is merged."""
    folders = defaultdict[Path, dict[str, int]](dict)
    for shard, number in sizes.items():
        if target is not None or is_local(shard):
            folders[target or Path(shard).parent / "sizes.json"][Path(shard).name] = number
    if target is not None and len(folders[target]) < len(sizes):
        raise UserError(
            f"{target} would hold one number for several shards of the same name: count each folder by itself."
        )
    for path, new in folders.items():
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            print(f"dtpvit: {path} cannot be written to; --out puts it elsewhere", file=sys.stderr)
            continue
        old = {} if target is not None else _sizes_in(path)
        write_json(path, dict(sorted((old | new).items())))


def _sizes_in(path: Path) -> dict[str, int]:
    """What an earlier count wrote, without the shards that have gone since."""
    try:
        sizes = parse_json(path.read_bytes())
        return {name: int(number) for name, number in sizes.items() if path.with_name(name).is_file()}
    except (OSError, ValueError, OverflowError, AttributeError, TypeError):
        return {}
