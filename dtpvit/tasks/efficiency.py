"""What an epoch of training cost: time, waiting for data, memory and tokens, measured in the run itself."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dtpvit.encoder.ops.collectives import gather_columns
from dtpvit.output_file import written_beside
from dtpvit.tasks.peak_memory import PeakMemory
from dtpvit.tasks.step_clock import StepClock
from dtpvit.tasks.token_count import TokenCount

__all__ = ["EfficiencyMonitor"]

COLUMNS: tuple[str, ...] = (
    "epoch",
    "steps",
    "step_seconds",
    "samples_per_second",
    "data_wait",
    "peak_memory_mib",
    "tokens_mean",
    "tokens_min",
    "tokens_max",
    "compression",
)

# What Lightning tells its profiler. Time between our own hooks would not do for the first: under several processes
# Lightning reads a tensor back from the device just before it fetches, and so waits there for the last step's work.
FETCH = "[_TrainingEpochLoop].train_dataloader_next"
SAVE = "save_checkpoint"


class EfficiencyMonitor(Callback):
    """Measures every training epoch, logs it as ``efficiency/...`` and writes it as a row of a CSV file.

    The time is that of the training steps, from asking for a batch to having worked through it; validation and the
    writing of checkpoints are left out. On a GPU, whose work runs behind the host's, the device is waited for where
    that time starts and stops (epoch, validation, checkpoint) and never in a step: the total is exact, and
    ``data_wait`` is the host's waiting, of which the device may have worked through a part. In the first epoch, what
    the loader does before training starts is not seen.

    Columns, over all ranks; where a run was resumed within an epoch, they are of the part after that:

    - ``epoch``: From 0, as in ``metrics.csv``.
    - ``steps``: Batches a rank worked through; with ``accumulate_grad_batches`` an optimizer step is several.
    - ``step_seconds``: Mean seconds a step, of the slowest rank.
    - ``samples_per_second``: Samples of all ranks in a second.
    - ``data_wait``: Share, from 0 to 1, of the time spent waiting for a batch, on the rank that waited longest. The
      start of the loader's workers at an epoch's first batch counts as waiting.
    - ``peak_memory_mib``: The most memory of any rank while it trained, in MiB: allocated by torch on a GPU, else the
      resident set of the process alone, without the loader's workers (see :class:`PeakMemory`).
    - ``tokens_mean``, ``tokens_min``, ``tokens_max``: Tokens an image after the last reducer, prefix included.
    - ``compression``: Patches in for each patch token out of the whole encoder.

    The last four are empty for a module whose ``training_step`` returns no ``token_count`` (:class:`TokenCount`); its
    samples are the rows of the first tensor found in the batch.

    Args:
        filename: Of the CSV file in the trainer's ``default_root_dir``; None writes none. A row replaces those of its
            own and later epochs, so that a resumed run goes on with the file.
    """

    def __init__(self, filename: str | None = "efficiency.csv") -> None:
        super().__init__()
        self.filename = filename
        self._clock = StepClock(torch.device("cpu"))
        self._memory = PeakMemory(torch.device("cpu"))
        self._peak = 0.0
        self._samples = 0.0
        self._count: TokenCount | None = None
        self._listening_to: Any = None
        self._saving = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a run resumed within an epoch has no start of an epoch."""
        device = pl_module.device
        self._clock = StepClock(device)
        self._memory = PeakMemory(device)
        self._listen(trainer)
        self._start_epoch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._start_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have the clock run, should the batch have been fetched before a validation."""
        self._clock.go_on()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, without waiting for the device."""
        count = outputs.get("token_count") if isinstance(outputs, Mapping) else None
        if isinstance(count, TokenCount):
            self._count = count if self._count is None else self._count + count
        self._samples += count.images if isinstance(count, TokenCount) else _batch_size(batch)
        self._clock.step_done()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock. Lightning starts the workers of validation before this hook, hence not now but earlier."""
        if self._clock.started:
            self._peak = max(self._peak, self._memory.read())
            self._clock.stop_after_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget validation's memory; the clock goes on when the next batch is asked for."""
        if self._clock.started:
            self._memory.reset()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the ranks together, log and write."""
        self._peak = max(self._peak, self._memory.read())
        self._clock.finish()
        device = pl_module.device if trainer.world_size > 1 else torch.device("cpu")
        found = _combine(gather_columns(self._figures(device)))
        if not found["steps"]:  # resumed at the end of an epoch, whose row is written
            return
        metrics = {f"efficiency/{name}": value for name, value in found.items() if name != "steps"}
        # All ranks hold the same numbers; Lightning warns where it may not average them.
        pl_module.log_dict(metrics, batch_size=1, sync_dist=trainer.world_size > 1)
        if self.filename is not None and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            _write_row(Path(trainer.default_root_dir) / self.filename, {"epoch": trainer.current_epoch, **found})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the profiler as it was: Lightning calls no teardown now."""
        self._unlisten()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the profiler as it was."""
        self._unlisten()

    def _start_epoch(self) -> None:
        self._peak, self._samples, self._count, self._saving = 0.0, 0.0, None, False
        self._memory.reset()
        self._clock.start()

    def _figures(self, device: torch.device) -> Tensor:
        """This rank's epoch as a column, in the order in which ``_combine`` takes it, float64, shape (11, 1)."""
        count, clock = self._count, self._clock
        tokens = [0, 0, 0, 0, 0, math.inf]
        if count is not None:
            shortest = count.shortest.item()
            tokens = [count.images, count.patches, count.tokens, count.patch_tokens, count.longest, shortest]
        figures = [clock.seconds, clock.waiting, clock.steps, self._peak, self._samples, *tokens]
        return torch.tensor(figures, dtype=torch.float64, device=device)[:, None]

    def _listen(self, trainer: Trainer) -> None:
        """Hear what Lightning tells its profiler, whichever that is, for as long as the fit lasts."""
        self._unlisten()
        profiler: Any = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
        start, stop = profiler.start, profiler.stop

        def heard_start(action_name: str) -> None:
            start(action_name)
            self._on_start(action_name)

        def heard_stop(action_name: str) -> None:
            self._on_stop(action_name)
            stop(action_name)

        # On the object, not the class: the profiler remains what it is, and other trainers' hear nothing.
        profiler.start, profiler.stop = heard_start, heard_stop
        self._listening_to = profiler

    def _unlisten(self) -> None:
        if self._listening_to is not None:
            del self._listening_to.start, self._listening_to.stop
            self._listening_to = None

    def _on_start(self, action: str) -> None:
        if action == FETCH:
            self._clock.ask()
        elif action == SAVE:
            self._saving = self._clock.stop()

    def _on_stop(self, action: str) -> None:
        if action == FETCH:
            self._clock.receive()
        elif action == SAVE and self._saving:
            self._clock.go_on()
            self._saving = False


def _batch_size(batch: Any) -> float:
    """Rows of the first tensor in ``batch``; NaN where there is none."""
    if isinstance(batch, Tensor):
        return float(len(batch)) if batch.ndim else math.nan
    inner = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(inner, str) or not isinstance(batch, Mapping | Sequence):
        return math.nan
    return next((size for size in map(_batch_size, inner) if not math.isnan(size)), math.nan)


def _combine(ranks: Tensor) -> dict[str, float]:
    """All ranks' columns, shape (11, ranks), to one epoch's numbers; those that nobody knows are absent."""
    seconds, waiting, steps, peak, samples, images, patches, tokens, kept, longest, shortest = ranks.cpu()
    slowest = seconds.max().item()
    found: dict[str, float] = {"steps": int(steps.max())}
    if not found["steps"]:
        return found
    found |= {
        "step_seconds": slowest / found["steps"],
        "samples_per_second": samples.sum().item() / slowest,
        "data_wait": (waiting / seconds.clamp(min=1e-9)).max().item(),
        "peak_memory_mib": peak.max().item(),
    }
    if images.sum() > 0:
        found |= {
            "tokens_mean": (tokens.sum() / images.sum()).item(),
            "tokens_min": int(shortest.min()),
            "tokens_max": int(longest.max()),
            "compression": (patches.sum() / kept.sum().clamp(min=1)).item(),
        }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _write_row(path: Path, row: Mapping[str, float]) -> None:
    """Add ``row`` to the file in place of those of its own and later epochs, at no moment leaving half a file."""
    earlier: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="") as file:
            earlier = [old for old in csv.DictReader(file) if _number(old.get("epoch")) < row["epoch"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(earlier)
        writer.writerow({name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()})


def _number(text: str | None) -> float:
    return int(text) if text and text.isdecimal() else math.inf
