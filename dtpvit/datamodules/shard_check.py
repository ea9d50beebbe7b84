"""``dtpvit data check``: everything decoded once, before a run of days depends on it."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dtpvit.datamodules.shard_keys import KeysOverShards
from dtpvit.datamodules.shard_repair import prepare_repair, repair_shard
from dtpvit.datamodules.shard_report import caption_histogram, percentiles, show_report
from dtpvit.datamodules.shard_survey import ShardSurvey, survey_shard, survey_shards
from dtpvit.datamodules.shards import is_local, named_shards, shard_stats, shard_stem
from dtpvit.errors import UserError
from dtpvit.output_file import output_file, write_json

__all__ = ["FOUND", "check"]

FOUND = 3
"""The command's exit code where something was found."""


def check(shards: list[str], repair: str | None = None, workers: int | None = None, json: str | None = None) -> int:
    """Decode every sample; list what is broken, what occurs twice, and how large images and captions are.

    Exits with code 0 if nothing is wrong and 3 if something is, repaired or not. A key that occurs in several shards is
    mentioned, but is nothing wrong: samples are told apart by shard and key.

    Args:
        shards: Folders, brace lists or globs of shards.
        repair: Folder for clean copies of the shards: the usable samples under their keys, a corrected ``_stats.json``
            beside each shard, a sizes.json. It must not hold shards yet.
        workers: Processes; one for each core if not given.
        json: JSON file for everything that was found, with every key.

    Raises:
        UserError: If no shard is there, or the copies cannot be written.
    """
    report, named = output_file(json), named_shards(shards)
    folder = None if repair is None else prepare_repair(named, repair)
    survey = survey_shard if folder is None else partial(repair_shard, folder=folder)
    findings = _Findings(named)
    try:
        for one in survey_shards(named, survey, workers):
            findings.add(one)
    except OSError as error:
        if folder is None:
            raise
        raise UserError(
            f"Writing to {folder} failed ({error.strerror or error}): the shards that are there are whole; make "
            "room and repair into an empty folder."
        ) from error
    if folder is not None:
        write_json(folder / "sizes.json", {f"{_stem(shard)}.tar": number for shard, number in findings.usable.items()})
    record = findings.record()
    show_report(record, findings.problems)
    if folder is not None:
        print(f"Wrote {sum(findings.usable.values()):,} samples in {len(named):,} shards to {folder}.")
    if report is not None:
        write_json(report, record)
    return FOUND if findings.problems else 0


class _Problem(NamedTuple):
    """``where`` is a key, or what is wrong with the shard."""

    shard: str
    where: str


class _Findings:
    """What is known of all shards; ``problems`` by cause, ``usable`` samples by shard."""

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = shards
        self.problems: dict[str, list[_Problem]] = defaultdict(list)
        self.usable: dict[str, int] = {}
        self.samples = 0
        self._empty = 0
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._lengths: Counter[int] = Counter()
        self._keys = KeysOverShards()
        self._stats = {shard: shard_stats(shard) for shard in shards}
        for shard, number in _holes(shards):
            self.problems["missing shard"].append(_Problem(shard, f"no shard of number {number}"))

    def add(self, survey: ShardSurvey) -> None:
        """What one shard holds, against what its ``_stats.json`` says."""
        self.usable[survey.shard] = survey.usable
        self.samples += len(survey.keys)
        self._sizes += survey.sizes
        self._lengths += survey.lengths
        self._keys.add(survey.shard, survey.keys)
        for fault in survey.faults:
            self.problems[fault.cause].append(_Problem(survey.shard, fault.where))
        stats, found = self._stats[survey.shard], len(survey.keys)
        if stats is None and any(self._stats.values()):
            self.problems["unfinished shard"].append(_Problem(survey.shard, "no _stats.json"))
        if stats is not None and stats["successes"] != found:
            said = f"{found} samples, {stats['successes']} by its _stats.json"
            self.problems["wrong number of samples"].append(_Problem(survey.shard, said))
        elif stats is not None and not found:
            self._empty += 1
        elif not found and not survey.faults:
            self.problems["empty shard"].append(_Problem(survey.shard, "no samples"))

    def record(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        number, examples = self._keys.shared()
        return {
            "command": shlex.join(["dtpvit", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "shards": len(self.shards),
            "empty_shards": self._empty,
            "samples": self.samples,
            "usable": sum(self.usable.values()),
            "problems": {cause: [list(problem) for problem in found] for cause, found in self.problems.items()},
            "keys_in_several_shards": {"number": number, "examples": examples},
            "percentiles": percentiles(self._sizes, self._lengths),
            "caption_lengths": caption_histogram(self._lengths),
        }


def _holes(shards: Sequence[str]) -> list[tuple[str, str]]:
    """(path, number) of shards that their folder's numbering leaves out, and that are not there."""
    numbered = defaultdict[tuple[Path, str, int], set[int]](set)
    for shard in filter(is_local, shards):
        if match := re.fullmatch(r"(.*?)(\d+)", _stem(shard)):
            numbered[Path(shard).parent, match[1], len(match[2])].add(int(match[2]))
    holes = []
    for (folder, prefix, digits), numbers in numbered.items():
        if max(numbers) - min(numbers) > 10 * len(numbers):
            continue  # these are dates, or a sample of the shards
        for number in sorted(set(range(min(numbers), max(numbers))) - numbers):
            path = folder / f"{prefix}{number:0{digits}d}.tar"
            if not path.exists():
                holes.append((str(path), f"{number:0{digits}d}"))
    return holes


def _stem(shard: str) -> str:
    return Path(shard_stem(shard)).name
