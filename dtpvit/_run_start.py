"""With what a training was started: versions, device, commit, command."""

import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from lightning.pytorch import Trainer

from dtpvit.evaluation.measuring import machine, versions
from dtpvit.json_input import parse_json
from dtpvit.output_file import write_json

__all__ = ["record_start"]


def record_start(trainer: Trainer, path: Path) -> None:
    """Add one entry a start to ``versions.json``: a continued run may go on elsewhere, with other versions."""
    try:
        earlier = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = []
    start = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["dtpvit", *sys.argv[1:]]),
        "versions": {**versions(), "lightning": version("lightning")},
        "device": machine(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "commit": _commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*(earlier if isinstance(earlier, list) else []), start])


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
