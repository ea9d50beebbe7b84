"""With what a training was started: versions, device, commit, command."""

import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from dtpvit._launcher import job, was_restarted
from dtpvit.evaluation.measuring import machine, versions
from dtpvit.json_input import parse_json
from dtpvit.output_file import write_json

__all__ = ["goes_on_by_itself", "record_start"]


def record_start(trainer: Trainer, path: Path) -> None:
    """Add one entry a start to ``versions.json``: a continued run may go on elsewhere, with other versions."""
    start = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["dtpvit", *sys.argv[1:]]),
        "versions": {**versions(), "lightning": version("lightning")},
        "device": machine(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "commit": _commit(),
        "job": job(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*_starts(path), start])


def goes_on_by_itself(path: Path) -> bool:
    """Whether this process is a restart of the job that the last start in ``versions.json`` belongs to.

    Where that start is of another job, the run is an older one of the same name: this job has not come to train yet.
    """
    last = _starts(path)[-1:]
    recorded = last[0].get("job") if last and isinstance(last[0], dict) else None
    return was_restarted(recorded if isinstance(recorded, dict) else {})


def _starts(path: Path) -> list[Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _commit() -> str | None:
    """The commit of this code or, where it is installed, of the project in the working folder; None if there is none.

    With ``-dirty`` where files differ from it.
    """
    for folder, tracked in ((Path(__file__).parent, Path(__file__).name), (Path.cwd(), ".")):
        asked = ["git", "-C", str(folder)]
        try:
            subprocess.run(
                [*asked, "ls-files", "--error-unmatch", tracked], check=True, capture_output=True, timeout=10
            )
            described = [*asked, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
            return subprocess.run(described, check=True, capture_output=True, timeout=30, text=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
    return None
