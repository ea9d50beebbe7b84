"""What a training run leaves in its folder, and what it says while it runs where no terminal shows a bar."""

import csv
import hashlib
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn

from dtpvit._run_start import record_start
from dtpvit.evaluation.run_record import FILES
from dtpvit.output_file import PARTIAL, named, written_beside
from dtpvit.tasks.checkpoint_file import remove_partial

__all__ = ["LineProgress", "RunCheckpoint", "RunLogger", "SaveRun", "StepSeed", "set_aside"]

_logger = logging.getLogger(__name__)

RECORDS = (*FILES, "hparams.yaml")
"""What a run writes into its folder, and ``nonfinite-rank*.jsonl``; anything else in there is left alone."""


class _Writer(ExperimentWriter):
    """Lightning's CSV writer, which would delete the metrics.csv that a continued run wants to extend.

    A full disk leaves whole rows, those written before included.
    """

    def __init__(self, log_dir: str, append: bool) -> None:
        self._append = append
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if self._append and path.is_file():
            _end_with_a_row(path)
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def save(self) -> None:
        """Write the rows that are not written yet."""
        path = Path(self.metrics_file_path)
        try:
            with named(path):
                super().save()
        except OSError:
            with suppress(OSError):
                _end_with_a_row(path)
            raise

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with written_beside(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames)
            writer.writeheader()
            writer.writerows(rows)


def _end_with_a_row(path: Path) -> None:
    """Cut off a last row that was not written to its end, lest the next one be joined to it."""
    content = path.read_bytes() if path.is_file() else b""
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


class RunLogger(CSVLogger):
    """Writes ``<folder>/metrics.csv``, one row a logging step; a continued run goes on with the file.

    Args:
        folder: The run's folder.
        append: Whether the run continues what the folder holds.
    """

    def __init__(self, folder: Path, append: bool) -> None:
        # Each row at once: of a run that is killed a hundred rows would be lost.
        super().__init__(save_dir=str(folder.parent), name=folder.name, version="", flush_logs_every_n_steps=1)
        self._append = append

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made when it is first asked for."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self._append)
        return self._experiment

    def finalize(self, status: str) -> None:
        """Write what is left; where a run has failed, an error here would keep Lightning from its teardown."""
        try:
            super().finalize(status)
        except OSError as error:
            if status != "failed":
                raise
            _logger.warning("the last rows of %s could not be written (%s)", error.filename, error.strerror)


class SaveRun(SaveConfigCallback):
    """Writes ``config.yaml`` and ``versions.json``; a fresh run first sets aside what an earlier one of its name left.

    This happens when training starts, not in ``setup``, so that a run that fails before its first step, for
    want of data, say, moves nothing.
    """

    def __init__(self, *args: Any, fresh: bool, folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not fresh and Path(self.config.get("ckpt_path") or "").is_file():
            # The saved file describes the run, not this continuation.
            self.config = self.config.clone()
            self.config.ckpt_path = None
        self.fresh = fresh
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: see the class."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room, then save the config and what runs it."""
        if trainer.is_global_zero and not self.already_saved:
            moved = set_aside(self.folder) if self.fresh else None
            if moved is not None:
                print(f"dtpvit: moved the earlier run of that name to {moved}", file=sys.stderr)
            record_start(trainer, self.folder / "versions.json")
        super().setup(trainer, pl_module, "fit")


def set_aside(folder: Path) -> Path | None:
    """Move a run's records to ``<folder>/earlier/<n>`` and return that; None if no run got anywhere."""
    found = [folder / name for name in RECORDS if (folder / name).exists()]
    found += sorted(folder.glob("nonfinite-rank*.jsonl"))
    # The rest is there before the first step.
    if not any((folder / name).exists() for name in ("checkpoints", "metrics.csv")):
        return None
    number = 1 + max((int(path.name) for path in folder.glob("earlier/*") if path.name.isdecimal()), default=0)
    target = folder / "earlier" / str(number)
    target.mkdir(parents=True)
    for path in found:
        path.rename(target / path.name)
    return target


class RunCheckpoint(ModelCheckpoint):
    """Lightning's callback, except that whatever it wrote can be gone on with, exactly, and holds all that was trained.

    Lightning leaves the steps after the last ``every_n_train_steps`` unsaved, and writes in ``fast_dev_run``; its link
    of ``save_last: link`` is gone for a moment whenever it is set. After the last batch of an epoch it writes a
    checkpoint that knows the batch but not the epoch as done: a run that goes on from there leaves the validation out,
    and counts epochs so that after a second interruption batches are repeated. Here it is written after the validation.
    """

    _postponed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clean up after a process that was killed while it wrote."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath and "://" not in str(self.dirpath):
            remove_partial(Path(self.dirpath))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the epoch that a run began which went on from such a checkpoint; Lightning has not."""
        epochs = trainer.fit_loop.epoch_progress
        if epochs.current.ready == trainer.current_epoch:
            epochs.increment_ready()
            epochs.increment_started()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every n steps, but not between an epoch's last batch and its validation."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            every = self._every_n_train_steps
            self._postponed = every > 0 and trainer.global_step % every == 0
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after every n epochs, and what was put off."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._postponed and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        self._postponed = False

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        link = Path(linkpath)
        if link.is_dir() and not link.is_symlink():  # FSDP's
            ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
            return
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            beside = link.with_name(f"{link.name}{PARTIAL}")
            beside.unlink(missing_ok=True)
            beside.symlink_to(os.path.relpath(filepath, link.parent))
            beside.replace(link)
        trainer.strategy.barrier()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state if it is not saved yet."""
        fast = bool(getattr(trainer, "fast_dev_run", False))
        if self.save_last and not fast and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class StepSeed(Callback):
    """Makes every random number of a training step a function of (seed, epoch, step in the epoch, rank).

    Dropout then goes on after a resume as it would have without the interruption, which Lightning, saving no
    random state, does not offer; and no two ranks drop the same units.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch's generators, those of the GPUs included."""
        place = f"{self.seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place, digest_size=7).digest()))


class LineProgress(ProgressBar):
    """Progress as plain lines on stderr, for log files: ten an epoch, and one after each validation.

    Args:
        lines_per_epoch: How many lines an epoch of training gets.
        min_seconds: No two lines of training come closer together than this, the last of an epoch excepted.
    """

    def __init__(self, lines_per_epoch: int = 10, min_seconds: float = 1.0) -> None:
        super().__init__()
        self.lines_per_epoch = lines_per_epoch
        self.min_seconds = min_seconds
        self._enabled = True
        self._last = (0.0, 0)

    def disable(self) -> None:
        """Print nothing from now on (all ranks but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a run resumed within an epoch starts there."""
        self._last = (time.monotonic(), trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._last = (time.monotonic(), 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time for one."""
        total = self.total_train_batches
        every = max(1, int(total) // self.lines_per_epoch) if total != float("inf") else 50
        done, now = batch_idx + 1, time.monotonic()
        seconds, since = now - self._last[0], self._last[1]
        last = done == total
        if not last and (done % every or seconds < self.min_seconds):
            return
        speed = (done - since) / max(seconds, 1e-9)
        self._last = (now, done)
        self._say(trainer, pl_module, "val", f"step {done}/{total}", f"{speed:.3g} steps/s")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a validation's metrics in training; after `dtpvit validate` Lightning shows a table."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._say(trainer, pl_module, "train", "validation")

    def _say(self, trainer: Trainer, pl_module: LightningModule, without: str, *words: str) -> None:
        """Print ``words`` and the metrics of the progress bar whose names do not start with ``without``."""
        if not self._enabled:
            return
        metrics = {
            k: v for k, v in self.get_metrics(trainer, pl_module).items() if not k.startswith(("v_num", without))
        }
        shown = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, int | float)]
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        epoch = f"epoch {trainer.current_epoch + 1}{epochs}"
        print("  ".join([epoch, *words, *shown]), file=sys.stderr, flush=True)
