"""Clean copies of shards: the usable samples under their keys, in their order, and img2dataset's numbers corrected."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from dtpvit.datamodules.shard_survey import LOST, OF_SAMPLES, ShardSurvey, survey_shard
from dtpvit.datamodules.shards import is_local, shard_stats, shard_stem
from dtpvit.errors import UserError
from dtpvit.output_file import write_json

__all__ = ["prepare_repair", "repair_shard"]


def prepare_repair(shards: Sequence[str], out: str) -> Path:
    """The folder for the copies, which is created.

    Raises:
        UserError: If a copy would overwrite a shard or another copy, or the folder cannot be written to.
    """
    folder = Path(out).expanduser()
    if commands := [shard for shard in shards if shard.startswith("pipe:")]:
        raise UserError(f"A copy of {commands[0]!r} would have no name: give --repair paths or addresses of shards.")
    names = Counter(_name(shard) for shard in shards)
    if (twice := names.most_common(1)[0])[1] > 1:
        raise UserError(f"{twice[1]} of the shards are called {twice[0]}: repair each folder by itself.")
    if folder.resolve() in {Path(shard).resolve().parent for shard in shards if is_local(shard)}:
        raise UserError(f"{out} holds the shards themselves: give --repair another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {out} cannot be made ({error.strerror}): give --repair another one.") from None
    if there := next((name for name in names if (folder / name).exists()), None):
        raise UserError(f"{out} already holds {there}: give --repair an empty folder.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"The folder {out} cannot be written to: give --repair another one.")
    return folder


def repair_shard(shard: str, folder: Path) -> ShardSurvey:
    """Copy the usable samples of a shard, every image decoded; the copy appears when it is whole.

    A caption that is not UTF-8 is written as training reads it. Of an image's members all are kept.

    Raises:
        OSError: If the copy cannot be written.
    """
    target = folder / _name(shard)
    partial = target.with_name(f"{target.name}.partial")
    try:
        with partial.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as tar:
                survey = survey_shard(shard, keep=lambda key, parts: _add(tar, key, parts))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    write_json(Path(f"{shard_stem(str(target))}_stats.json"), _stats(shard_stats(shard) or {}, survey))
    return survey


def _name(shard: str) -> str:
    return f"{shard_stem(PurePath(shard).name)}.tar"


def _add(tar: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> None:
    for ending, data in parts.items():
        member = tarfile.TarInfo(f"{key}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _stats(source: dict[str, Any], survey: ShardSurvey) -> dict[str, Any]:
    """img2dataset's record, what turned out to be unusable being added to the failures."""
    statuses = Counter(source.get("status_dict", {}))
    statuses["success"] = survey.usable
    statuses.update(fault.cause for fault in survey.faults if fault.cause in OF_SAMPLES)
    statuses[LOST] += max(0, source.get("successes", 0) - len(survey.keys))
    numbers = {status: number for status, number in statuses.items() if number or status == "success"}
    return source | {"count": sum(numbers.values()), "successes": survey.usable, "status_dict": numbers}
