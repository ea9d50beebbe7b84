"""Which batch sizes fit and how fast they train, tried one after the other by Lightning's tuner."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.tuner.tuning import Tuner

from dtpvit.errors import UserError
from dtpvit.tasks.peak_memory import PeakMemory
from dtpvit.tasks.trials import trial_of

__all__ = ["BatchSizes", "Tried", "find_batch_size"]


@dataclass(frozen=True)
class Tried:
    """One batch size: its images/s, loading included, None if memory ran out, and the peak of memory in MiB."""

    batch_size: int
    speed: float | None
    memory: float


@dataclass(frozen=True)
class BatchSizes:
    """What was tried, smallest first, and why no more was.

    Attributes:
        tried: At least one that fitted.
        ended_by: Half a sentence.
    """

    TOLERANCE: ClassVar[float] = 0.05

    tried: tuple[Tried, ...]
    ended_by: str

    @property
    def largest(self) -> int:
        """The largest that fitted."""
        return max(one.batch_size for one in self.tried if one.speed is not None)

    @property
    def suggestion(self) -> int:
        """The smallest whose images/s are within 5 % of the most."""
        speeds = {one.batch_size: one.speed for one in self.tried if one.speed is not None}
        return min(size for size, speed in speeds.items() if speed >= (1 - self.TOLERANCE) * max(speeds.values()))

    def write(self, path: Path) -> None:
        """Write the table as a CSV file."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["batch_size", "images_per_second", "peak_memory_mib"])
            for one in self.tried:
                speed = "" if one.speed is None else f"{one.speed:.6g}"
                writer.writerow([one.batch_size, speed, f"{one.memory:.6g}"])


def find_batch_size(
    trainer: Trainer,
    task: LightningModule,
    data: Any,
    *,
    max_batch_size: int = 1024,
    steps_per_trial: int = 10,
    report: Callable[[Tried], None] = lambda tried: None,
) -> BatchSizes:
    """Train a copy of ``task`` for some batches of 2, 4, 8, ... images each, until memory or the data are used up.

    On a CPU memory has no such end: the system stops the process, or swaps. There it also ends once two doublings in a
    row brought less than 5 % more images/s. Lightning's tuner makes each trial. Left to itself it measures no speed,
    makes its first trial at the config's size in place of the one that it names, and never tries its limit.

    Args:
        trainer: On one device, with the options :data:`dtpvit.tasks.trials.TRIAL`.
        task: To train. With ``cache_features`` the speed is that of the first epoch.
        data: A LightningDataModule with ``batch_size``, which is put back in the end.
        max_batch_size: No larger one is tried.
        steps_per_trial: Batches that are timed, after as many as the loader has workers, and one, have gone.
        report: Told of each size.

    Raises:
        UserError: If not even the smallest can be tried.
    """
    if max_batch_size < 2 or steps_per_trial < 1:
        raise UserError(
            f"max_batch_size is {max_batch_size} and steps_per_trial {steps_per_trial}; give at least 2 and at least 1."
        )
    if trainer.world_size > 1:
        raise UserError(
            f"a batch size is found on one device, and these are {trainer.world_size}; add --trainer.devices 1."
        )
    if not hasattr(data, "batch_size"):
        raise UserError(f"{type(data).__name__} has no batch_size to change; give it one to tune.")
    given, tried, ended_by = data.batch_size, list[Tried](), f"max_batch_size is {max_batch_size}."
    try:
        for size in (2**power for power in range(1, max_batch_size.bit_length())):
            try:
                tried.append(_try(trainer, task, data, size, steps_per_trial))
            except UserError as error:  # not even one batch of this size is there
                if not tried:
                    raise
                ended_by = str(error)
                break
            report(tried[-1])
            if tried[0].speed is None:
                raise UserError(
                    f"not even {size} images fit into memory; take a smaller model or another --trainer.precision."
                )
            if tried[-1].speed is None:
                ended_by = f"memory ran out at {size}."
                break
            if trainer.strategy.root_device.type == "cpu" and _saturated(tried):
                ended_by = (
                    "the last two doublings brought less than 5 %, and on a CPU nothing says when memory runs out."
                )
                break
    finally:
        data.batch_size = given
    return BatchSizes(tuple(tried), ended_by)


def _try(trainer: Trainer, task: LightningModule, data: Any, size: int, steps: int) -> Tried:
    # What workers have prepared while the first batch was waited for is gone by then; after that comes their true pace.
    warmup = 1 + int(getattr(data, "num_workers", 0))
    device, pieces = trainer.strategy.root_device, trainer.accumulate_grad_batches
    updates = math.ceil((warmup + steps) / pieces)
    pace, memory = _Pace(device, warmup, updates * pieces), PeakMemory(device)
    memory.reset()
    # Lightning has made the first loader by the time it sets the size.
    data.batch_size = size
    with trial_of(task, pace.after_batch) as trial:
        fitted = Tuner(trainer).scale_batch_size(
            trial, datamodule=data, steps_per_trial=updates, init_val=size, max_trials=1, max_val=2 * size
        )
    return Tried(size, size * (updates * pieces - warmup) / pace.seconds if fitted == size else None, memory.read())


class _Pace:
    """Seconds from the end of one batch to that of another, the device's work included."""

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.done = 0
        self.seconds = math.nan

    def after_batch(self, outputs: Any) -> None:
        self.done += 1
        if self.done not in (self.first, self.last):
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        if self.done == self.first:
            self._began = perf_counter()
        else:
            self.seconds = perf_counter() - self._began


def _saturated(tried: list[Tried]) -> bool:
    speeds = [one.speed or 0.0 for one in tried]
    return len(speeds) > 2 and max(speeds[-2:]) < (1 + BatchSizes.TOLERANCE) * max(speeds[:-2])
