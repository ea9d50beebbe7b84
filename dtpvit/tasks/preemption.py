"""Ending a training on request: at the end of a step, on all ranks together, and with everything saved."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, distributed

__all__ = ["STOPPED", "Preemption"]

logger = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that ended on request: not 0, for what follows in a script counts on a finished training."""

_END, _REQUEUE = 1, 2
_SAME_REQUEST = 1.0
"""Seconds in which a second signal is the first once more: SLURM and torchrun may each deliver it."""


class Preemption(Callback):
    """Ends the training after the step under way when SIGTERM or SIGUSR1 arrives, and writes ``last.ckpt``.

    In place of Lightning's handlers, which act in the middle of a step, on the first rank's word alone, and save
    nothing on SIGTERM. A run continued from that file equals one that was never stopped. A validation under way is cut
    short; the continued run begins it anew. SIGUSR1 is what SLURM is asked to send before its time limit: where
    Lightning would requeue the job, it is requeued here too. A second SIGTERM ends the process at once.

    Ranks may be told at different times, or one alone: each step they take the largest of what they were told, in a
    reduction of one number that starts with the step and is read when it ends. Under several processes Lightning reads
    a number back from the device at the same place anyway.

    Raises:
        SIGTERMException: To leave the training; its code is :data:`STOPPED`, or 0 in a process that Lightning has
            started itself, whose failure it would answer by killing the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Trainer | None = None
        self._asked = self._agreed = 0
        self._signal = "SIGTERM"
        self._asked_at = 0.0
        self._listener = 0  # its process
        self._common: Tensor | None = None
        self._reduction: distributed.Work | None = None
        self._leaving = self._validation_due = self._between_epochs = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise; a resumed run has no sanity check."""
        self._listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to ask the ranks."""
        self._start_asking(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if any rank was told to."""
        self._agreed = self._answer()
        loop = trainer.fit_loop.epoch_loop
        self._validation_due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # pyright: ignore
        # After the last step of an epoch without validation, the epoch ends first: no resume would make up for that.
        if self._agreed and _is_whole(trainer) and (self._validation_due or not loop._is_training_done):
            trainer._logger_connector.on_batch_end()  # the step's figures, as Lightning would log them next
            trainer._logger_connector.update_train_step_metrics()
            self._leave(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and leave, if the ranks were told to in the last step of the epoch before."""
        if self._agreed:
            self._between_epochs = True
            self._leave(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave the rest of the batches out. The ranks have unequally many of them, and so meet only at the end."""
        if self._asked and _is_whole(trainer):
            raise StopIteration

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and leave, if any rank was told to, before figures are made of a part of the images."""
        self._start_asking(trainer)
        self._agreed = self._answer()
        if self._agreed and _is_whole(trainer):
            self._validation_due = True
            self._leave(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the place of a run that leaves in such a way that Lightning goes on there."""
        if not self._leaving:
            return
        loops = checkpoint["loops"]["fit_loop"]
        training, validation = (loops[f"epoch_loop.{loop}batch_progress"] for loop in ("", "val_loop."))
        for count in ("total", "current"):
            if self._validation_due:  # it is to begin: Lightning takes one for interrupted that has a batch not done
                training[count]["completed"] = training[count]["processed"]
                begun = int(count == "total")
                validation[count] |= {"ready": begun, "started": begun, "processed": 0, "completed": 0}
            elif self._between_epochs:  # it would leave the epoch out that is about to start, not one that has ended
                epoch = loops["epoch_progress"][count]
                epoch |= {"ready": epoch["started"], "completed": epoch["processed"] - 1}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer, which puts the signal handlers back that it found."""
        self._trainer = None

    def _listen(self, trainer: Trainer) -> None:
        if self._trainer is trainer or threading.current_thread() is not threading.main_thread():
            return
        self._trainer = trainer
        connector = trainer._signal_connector
        self._asked, connector.received_sigterm = int(connector.received_sigterm), False
        slurm = _slurm(trainer)
        self._listener = os.getpid()
        for number in (signal.SIGTERM, (slurm and slurm.requeue_signal) or signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._listener:  # a process forked in the training, a pool's for instance, has no such step
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        assert self._trainer is not None
        if self._asked and number == signal.SIGTERM and time.monotonic() - self._asked_at > _SAME_REQUEST:
            _pass_on(self._trainer, signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._asked:
            self._signal, self._asked_at = signal.Signals(number).name, time.monotonic()
            _pass_on(self._trainer, signal.SIGTERM)
        slurm = _slurm(self._trainer)
        requeues = number != signal.SIGTERM and slurm is not None and slurm.auto_requeue
        self._asked = max(self._asked, _REQUEUE if requeues else _END)

    def _start_asking(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            self._common = torch.tensor(self._asked, device=trainer.strategy.root_device)
            self._reduction = distributed.all_reduce(self._common, distributed.ReduceOp.MAX, async_op=True)

    def _answer(self) -> int:
        """The most that any rank was asked for: nothing, to end, or to end and be requeued."""
        if self._common is None or self._reduction is None:
            return self._asked
        self._reduction.wait()
        return int(self._common.item())

    def _leave(self, trainer: Trainer) -> None:
        self._leaving = True
        path = None if trainer.sanity_checking else _save_last(trainer)
        if trainer.is_global_zero:
            step = f"after step {trainer.global_step}, in epoch {trainer.current_epoch + 1}"
            saved = "nothing was saved" if path is None else f"saved in {os.path.relpath(path)}"
            on = "" if path is None else "; the same command with --ckpt_path last goes on there"
            print(f"dtpvit: stopped by {self._signal} {step}; {saved}{on}", file=sys.stderr, flush=True)
            if self._agreed == _REQUEUE:
                _requeue()
        trainer.training = True  # whose end takes down the loaders of both, validation's and training's
        environment = trainer._accelerator_connector.cluster_environment
        child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise SIGTERMException(0 if child else STOPPED)


def _is_whole(trainer: Trainer) -> bool:
    """Whether the optimizer has taken in every batch so far; gradients that wait for more are in no checkpoint."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def _save_last(trainer: Trainer) -> str | None:
    """Write ``last.ckpt`` as the run's checkpoint callback would; None where there is no such callback."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or not callback.save_last:
        return None
    callback.save_last = True  # "link" would point to an earlier step
    callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    return callback.last_model_path


def _pass_on(trainer: Trainer, number: signal.Signals) -> None:
    """Pass a signal on to the processes that this one has started as ranks."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(number)


def _slurm(trainer: Trainer) -> SLURMEnvironment | None:
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) else None


def _requeue() -> None:
    """Hand the job back to SLURM's queue."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("the job %s could not be requeued: %s", job, getattr(error, "stderr", None) or error)
