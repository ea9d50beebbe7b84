"""Runs of `dtpvit fit` in processes of their own that are killed, and what must come out the same nevertheless."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

__all__ = ["Diary", "differences", "final_history", "fit", "start", "wait_for"]

# A server that has imported everything forks the runs: a start takes a tenth of a second, not ten.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["dtpvit._trainer_cli", "dtpvit.datamodules.image_text", "dtpvit.tasks.classification"])

_MOMENTS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start")
_OWN_TIME = ("EfficiencyMonitor", "Timer")  # what they save is time measured
_OWN_PLACE = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")


class Diary(Callback):
    """Writes down which samples each step saw, and if told to, ends the process by a signal at some place.

    Args:
        file: A line of JSON is appended to it for each start and each batch: the optimizer steps before it, the epoch,
            and the batch's keys, null for a start.
        at_step: Optimizer steps after which the process is killed.
        moment: In which hook.
    """

    def __init__(self, file: str, at_step: int | None = None, moment: str = _MOMENTS[2]) -> None:
        self.file, self.at_step, self.moment = file, at_step, moment

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer, None)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        keys = batch.get("key", batch.get("record"))
        self._write(trainer, keys.tolist() if isinstance(keys, Tensor) else keys)
        self._die(trainer, _MOMENTS[0])

    def _write(self, trainer: Trainer, keys: list[Any] | None) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps([trainer.global_step, trainer.current_epoch, keys]) + "\n")

    def on_before_optimizer_step(self, trainer: Trainer, *unused: Any) -> None:
        self._die(trainer, _MOMENTS[1])

    def on_train_batch_end(self, trainer: Trainer, *unused: Any) -> None:
        self._die(trainer, _MOMENTS[2])

    def on_validation_start(self, trainer: Trainer, *unused: Any) -> None:
        self._die(trainer, _MOMENTS[3])

    def _die(self, trainer: Trainer, moment: str) -> None:
        if self.at_step is not None and moment == self.moment and trainer.global_step >= self.at_step:
            os.kill(os.getpid(), signal.SIGKILL)


def start(arguments: Sequence[str], folder: Path) -> BaseProcess:
    """Start ``dtpvit`` with these arguments in a process of its own; its output goes to ``folder/log``."""
    process = _SERVER.Process(target=_run, args=(list(arguments), folder))
    process.start()
    return process


def fit(arguments: Sequence[str], folder: Path, *, kill_after: float | None = None, timeout: float = 300) -> int:
    """Run to the end, or to a SIGKILL after some seconds, and return the exit code: -9 if it was killed.

    Raises:
        TimeoutError: If it takes too long.
    """
    process = start(arguments, folder)
    process.join(timeout if kill_after is None else kill_after)
    if process.is_alive():
        process.kill()
        process.join()
        if kill_after is None:
            raise TimeoutError(f"{' '.join(arguments)} took longer than {timeout} s; see {folder / 'log'}")
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    torch.set_num_threads(1)
    from dtpvit.cli import main

    raise SystemExit(main(arguments))


def final_history(file: Path) -> list[tuple[int, int, Any]]:
    """Optimizer steps before it, epoch and keys of each batch that the final weights were learned from, in order.

    What a process did after the checkpoint from which another went on was lost and done again: it does not count.
    """
    history: list[tuple[int, int, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        step, epoch, keys = json.loads(line)
        if keys is None:
            history = [batch for batch in history if batch[0] < step]
        else:
            history.append((step, epoch, keys))
    return history


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Places where two checkpoints differ by as much as a bit, times measured and names of folders left out."""
    if any(name in where for name in _OWN_TIME) or where.rsplit("/", 1)[-1] in _OWN_PLACE:
        return []
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if found.keys() != expected.keys():
            return [f"{where}: {sorted(map(str, found.keys() ^ expected.keys()))} are in one only"]
        return [line for key in expected for line in differences(found[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        same = found.dtype == expected.dtype and found.shape == expected.shape
        return [] if same and torch.equal(_bits(found), _bits(expected)) else [f"{where}: tensors differ"]
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for number, (one, other) in pairs for line in differences(one, other, f"{where}/{number}")]
    same = found == expected or (found != found and expected != expected)  # two NaNs
    return [] if same else [f"{where}: {str(found)[:60]} and {str(expected)[:60]}"]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def wait_for(path: Path, process: BaseProcess, *, more_than: int = 0, timeout: float = 300) -> bool:
    """Whether the file came to hold more than so many bytes while the process was running."""
    end = time.monotonic() + timeout
    while process.is_alive() and time.monotonic() < end:
        with suppress(FileNotFoundError):
            if path.stat().st_size > more_than:
                return True
        time.sleep(0.0005)
    return False
