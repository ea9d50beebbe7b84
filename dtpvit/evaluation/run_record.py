"""What a run has left in its folder, read with what is missing or broken in it said instead of raised."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dtpvit.errors import UserError
from dtpvit.interop.weight_files import read_checkpoint
from dtpvit.json_input import parse_json
from dtpvit.yaml_input import parse_yaml

__all__ = ["RunRecord", "judged_on", "read_runs"]

FILES = ("config.yaml", "metrics.csv", "efficiency.csv", "checkpoints", "pictures", "skipped.jsonl", "versions.json")

_JUDGED_ON = {
    "images": "images",
    "pairs": "pairs",
    "zeroshot_images": "images for zero-shot",
    "conversations": "conversations",
    "answers": "answers",
}

Points = list[tuple[int, float]]
Found = TypeVar("Found")


def judged_on(figures: Mapping[str, Any]) -> str:
    """Those figures of a validation that are numbers of samples, in words; "" if there is none.

    >>> judged_on({"pairs": 9.0, "tokens": 17.0, "zeroshot_images": 4.0})
    '9 pairs, 4 images for zero-shot'
    """
    return ", ".join(f"{float(figures[name]):.0f} {word}" for name, word in _JUDGED_ON.items() if name in figures)


@dataclass
class RunRecord:
    """A run's folder.

    Attributes:
        folder: As it was given.
        name: Of the folder, with as many folders above it as tell it from the other runs.
        config: What it was started with; empty if that is not known.
        encoder: Of an instruction run, what its checkpoint says; the config may name another run's checkpoint instead.
        curves: For each metric its (optimizer step, value), by step; where a run went back to a checkpoint, what it
            wrote the second time.
        epochs: How many are worked through, by efficiency.csv, else the checkpoint, else metrics.csv; None if nothing
            says.
        efficiency: Rows of ``efficiency.csv``, by epoch.
        starts: Entries of ``versions.json``, the first start and every continuation.
        picture: The last one of ``SegmentMonitor``.
        skipped: Records that could not be used, by cause, as ``skipped.jsonl`` lists them.
        missing: What is not there or cannot be read, in words.
    """

    folder: Path
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    encoder: Any = None
    curves: dict[str, Points] = field(default_factory=dict)
    epochs: int | None = None
    efficiency: list[dict[str, float]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    picture: Path | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def at(self, *keys: str) -> Any:
        """An entry of the config, such as ``at("trainer", "max_epochs")``; None where there is none."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None without any."""
        return self.curves[metric][-1][1] if self.curves.get(metric) else None

    def skipped_samples(self) -> dict[str, int]:
        """What the training left out, by cause, in the epoch that left out most.

        Each epoch counts anew, from where its process began: of one that a continuation took up, only the rest.
        """
        epochs = dict[int, dict[str, int]]()
        for name, points in self.curves.items():
            if name.startswith("data/skipped/"):
                cause = name.removeprefix("data/skipped/").replace("_", " ")
                for step, count in points:
                    epochs.setdefault(step, {})[cause] = round(count)
        return max(epochs.values(), key=lambda causes: sum(causes.values()), default={})

    def left_out(self) -> int:
        """Samples that the last validation could not use; a validation that used all logs no number."""
        steps = [points[-1][0] for name, points in self.curves.items() if name.startswith("val/") and points]
        step, count = next(reversed(self.curves.get("val/skipped", [])), (-1, 0.0))
        return round(count) if step == max(steps, default=-1) else 0

    def mean(self, column: str) -> float | None:
        """Mean of a column of ``efficiency.csv`` over the steps of all epochs; None where nobody knows."""
        rows = [(row[column], row.get("steps", 1.0)) for row in self.efficiency if column in row]
        steps = sum(step for _, step in rows)
        return sum(value * step for value, step in rows) / steps if steps else None


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """The runs in these folders, each once.

    Raises:
        UserError: If one of the folders is no run's.
    """
    paths = dict[Path, Path]()
    for path in (Path(folder).expanduser() for folder in folders):
        paths.setdefault(path.resolve(), path)
    runs = [_read(path) for path in paths.values()]
    if not any(_holds_a_run(run.folder) for run in runs):
        raise UserError(f"{' and '.join(folders)} is empty; give folders in which `dtpvit fit` has begun to train")
    for run, name in zip(runs, _names([run.folder for run in runs]), strict=True):
        run.name = name
    return runs


def _read(folder: Path) -> RunRecord:
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the run's folder, such as runs/quickstart")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give folders of `dtpvit fit`, such as runs/quickstart")
    run = RunRecord(folder)
    if not _holds_a_run(folder):
        if {path.name for path in folder.iterdir()} <= {"earlier"}:
            run.missing.append("nothing: the fit ended before its first step, or is about to begin")
            return run
        inside = sum(map(_holds_a_run, folder.iterdir()))
        advice = f"it holds {inside} of them: give {folder}/*" if inside else f"expected {', '.join(FILES[:4])} in it"
        raise UserError(f"{folder} is no folder of a run; {advice}")
    run.config = _part(run, "config.yaml", _config, {})
    run.curves, begun = _part(run, "metrics.csv", _metrics, ({}, None))
    run.efficiency = _part(run, "efficiency.csv", _efficiency, [])
    content = _part(run, "checkpoints/last.ckpt", lambda path: read_checkpoint(path, mmap=True), {})
    if isinstance(known := content.get("hyper_parameters"), dict):
        run.config = run.config or {"model": {"init_args": known}}
        run.encoder = known.get("encoder")
    run.epochs = int(run.efficiency[-1]["epoch"]) + 1 if run.efficiency else _trained_epochs(content, begun)
    run.starts = _part(run, "versions.json", _starts, [])
    run.picture = max(
        (folder / "pictures").glob("epoch*.png"), key=lambda path: (len(path.name), path.name), default=None
    )
    if (folder / "skipped.jsonl").exists():
        run.skipped = _part(run, "skipped.jsonl", _skipped, {})
    return run


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def _part(run: RunRecord, name: str, read: Callable[[Path], Found], otherwise: Found) -> Found:
    """What ``read`` makes of a file of the run; what goes wrong is noted."""
    path = run.folder / name
    if not path.exists():
        run.missing.append(f"no {name}")
        return otherwise
    try:
        return read(path)
    except UserError as error:
        run.missing.append(str(error))
    except (OSError, ValueError, csv.Error, yaml.YAMLError, RecursionError) as error:
        # Not what the parser says: that fills lines, and one looks into the file anyway.
        what = error.strerror if isinstance(error, OSError) else "damaged, or of another kind"
        run.missing.append(f"{name} cannot be read ({what})")
    return otherwise


def _config(path: Path) -> dict[str, Any]:
    found = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("expected a mapping")
    return found


def _metrics(path: Path) -> tuple[dict[str, Points], int | None]:
    curves, epoch = dict[str, Points](), None
    for row in _rows(path):
        if "epoch" in row:
            epoch = int(row["epoch"])
        if "step" not in row:
            continue
        step = int(row["step"])
        for name in [name for name in row if name not in ("step", "epoch")]:
            points = curves.setdefault(name, [])
            while points and points[-1][0] >= step:  # the run went back to a checkpoint
                points.pop()
            points.append((step, row[name]))
    return curves, epoch


def _efficiency(path: Path) -> list[dict[str, float]]:
    return sorted((row for row in _rows(path) if "epoch" in row), key=lambda row: row["epoch"])


def _trained_epochs(checkpoint: dict[str, Any], begun: int | None) -> int | None:
    try:
        return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError, ValueError):
        return begun


def _rows(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each row by their column; a file without its header has none."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: value for name, text in row.items() if name and math.isfinite(value := _number(text))}
            for row in csv.DictReader(file)
        ]


def _number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return math.nan


def _starts(path: Path) -> list[dict[str, Any]]:
    found = parse_json(path.read_bytes())
    if not isinstance(found, list) or not all(isinstance(start, dict) for start in found):
        raise ValueError("expected a list of starts")
    return found


def _skipped(path: Path) -> dict[str, int]:
    rows = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    causes = Counter(str(row.get("cause")) if isinstance(row, dict) else "unknown" for row in rows)
    return dict(sorted(causes.items()))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    names = ["/".join(part[-depth:]) for part in parts]
    return [name.encode("utf-8", "replace").decode() for name in names]  # matplotlib draws nothing that is no text
