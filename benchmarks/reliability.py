"""Runs killed at random moments, and what of them is lost: python -m benchmarks.reliability --output FILE.md"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli

from benchmarks.killed_runs import differences, final_history, fit, start, wait_for
from benchmarks.record import heading, pages, table
from benchmarks.small_runs import logged, write_config, write_images
from dtpvit.interop.weight_files import damage

_WHAT = """\
Small runs of 21 steps of both tasks (`benchmarks/small_runs.py`: boundary noise, stochastic depth, mixing,
augmentation, a weight average, a calibrated threshold, unreadable images), a checkpoint every {every} steps, each in a
process of its own. A run is killed by SIGKILL at a random moment of its training, then gone on with (`--ckpt_path
last`) and killed again, {kills} times in all where it does not end before; then it runs to its end and is compared with
one that nobody killed. While writing: a kill left a half-written file. Damaged: checkpoints found not to be whole after
a kill. Steps redone: batches after the last checkpoint, computed once more. Lost, twice: samples in the history of the
unkilled run's weights and not of this one's, and the reverse. Rows missing: steps of which `metrics.csv` lacks a row,
which is written after the step's checkpoint. Differing: entries of `last.ckpt` (weights, average, optimizer, schedule,
loops, callbacks, calibration) that are not the same bit for bit, and values of `metrics.csv`; times measured and counts
of skipped samples are left out.
"""


@dataclass
class Fate:
    """What became of a run."""

    kills: int = 0
    in_writing: int = 0
    damaged: int = 0
    redone: int = 0
    lost: int = 0
    twice: int = 0
    unlogged: int = 0
    differing: int = 0


def reliability(minutes: float = 8.0, kills: int = 3, every: int = 2, seed: int = 0, output: str | None = None) -> None:
    """Kill runs for some minutes and count what is lost.

    Args:
        minutes: No further run is begun after these.
        kills: In a row, of each run.
        every: Optimizer steps between checkpoints.
        seed: Of the moments.
        output: Markdown file to write.
    """
    draw, end = random.Random(seed), time.monotonic() + 60 * minutes
    setups = [(kind, workers) for workers in (0, 2, 3) for kind in ("contrastive", "classification")]
    fates: dict[tuple[str, int], list[Fate]] = {setup: [] for setup in setups}
    with tempfile.TemporaryDirectory() as scratch:
        images = write_images(Path(scratch) / "images")
        wholes: dict[tuple[str, int], _Whole] = {}
        turn = 0
        while time.monotonic() < end:
            setup = setups[turn % len(setups)]
            if setup not in wholes:
                wholes[setup] = _Whole(setup, images, Path(scratch) / f"whole{turn}", every)
            fates[setup].append(
                _torment(setup, images, Path(scratch) / f"run{turn}", wholes[setup], draw, kills, every)
            )
            print(*setup, fates[setup][-1], flush=True)
            turn += 1
    rows = [[f"{kind}, {workers} workers", *_total(fates[kind, workers])] for kind, workers in setups]
    rows.append(["all", *_total([fate for row in fates.values() for fate in row])])
    names = ["runs", "kills", "while writing", "damaged", "steps redone", "lost", "twice", "rows missing", "differing"]
    what = _WHAT.format(every=every, kills=kills)
    pages([heading("Killed and gone on with", torch.device("cpu")), what, table(["", *names], rows)], output)


class _Whole:
    """A run that nobody kills."""

    def __init__(self, setup: tuple[str, int], images: Path, folder: Path, every: int) -> None:
        self.folder, self.diary = folder, folder.with_suffix(".jsonl")
        arguments = _arguments(setup, images, folder, every)
        process = start(arguments, folder)
        wait_for(self.diary, process)
        begun = time.monotonic()
        process.join()
        self.seconds = time.monotonic() - begun
        if process.exitcode:
            raise SystemExit((folder / "log").read_text(encoding="utf-8"))


def _torment(
    setup: tuple[str, int], images: Path, folder: Path, whole: _Whole, draw: random.Random, kills: int, every: int
) -> Fate:
    fate, diary, checkpoints = Fate(), folder.with_suffix(".jsonl"), folder / "checkpoints"
    arguments = _arguments(setup, images, folder, every)
    for _ in range(kills):
        known = diary.stat().st_size if diary.exists() else 0
        process = start(arguments, folder)
        wait_for(diary, process, more_than=known)
        process.join(draw.uniform(0, whole.seconds / 2))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        fate.kills += 1
        fate.in_writing += any(checkpoints.glob("*.partial"))
        fate.damaged += sum(damage(path) is not None for path in checkpoints.glob("*.ckpt"))
    if code := fit(arguments, folder):
        raise SystemExit(f"exit code {code}:\n{(folder / 'log').read_text(encoding='utf-8')[-2000:]}")
    found, expected = (
        torch.load(place / "checkpoints/last.ckpt", weights_only=True) for place in (folder, whole.folder)
    )
    values, others = (logged(place / "metrics.csv") for place in (folder, whole.folder))
    differing = differences(found, expected)
    differing += [f"{at}: {values[at]} and {others[at]}" for at in others if values.get(at, others[at]) != others[at]]
    fate.unlogged = len({step for step, name in others if (step, name) not in values})
    history, other = final_history(diary), final_history(whole.diary)
    seen, due = (Counter((epoch, key) for _, epoch, keys in batches for key in keys) for batches in (history, other))
    fate.lost, fate.twice = sum((due - seen).values()), sum((seen - due).values())
    differing += ["the order of the samples"] * (history != other)
    print(*differing, sep="\n", end="\n" if differing else "")
    fate.differing = len(differing)
    batches = sum(not line.endswith("null]") for line in diary.read_text(encoding="utf-8").splitlines())
    fate.redone = batches - len(history)
    shutil.rmtree(folder)
    return fate


def _arguments(setup: tuple[str, int], images: Path, folder: Path, every: int) -> list[str]:
    kind, workers = setup
    diary = {"file": str(folder.with_suffix(".jsonl"))}
    return write_config(kind, images, folder.with_suffix(".yaml"), num_workers=workers, diary=diary, every=every)


def _total(fates: list[Fate]) -> list[int]:
    names = ("kills", "in_writing", "damaged", "redone", "lost", "twice", "unlogged", "differing")
    return [len(fates), *(sum(getattr(fate, name) for fate in fates) for name in names)]


if __name__ == "__main__":
    auto_cli(reliability, as_positional=False)
