"""The learning-rate range test by Lightning's tuner, of one base rate of which every parameter group has a multiple."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.optim import Optimizer

from dtpvit.errors import UserError
from dtpvit.tasks.rate_curve import RateCurve
from dtpvit.tasks.trials import trial_of

__all__ = ["check_sweep", "find_learning_rate", "rate_name"]


def find_learning_rate(
    trainer: Trainer,
    task: LightningModule,
    data: LightningDataModule | None = None,
    *,
    min_lr: float = 1e-7,
    max_lr: float = 1.0,
    num_training: int = 100,
) -> RateCurve:
    """Train a copy of ``task`` while its learning rate rises exponentially, and record the loss of every step.

    Smith, "Cyclical Learning Rates for Training Neural Networks", 2017. Lightning's tuner does the sweep. It gives all
    parameter groups one rate; here that is the base rate, and each group steps with it times what the group's rate is
    of the task's ``learning_rate``. Warm-up and schedule of the task are left out, its accumulation, clipping and
    precision are not. Losses and the end are taken from the steps themselves: the tuner smooths with a correction that
    is one step late, so that its first loss is half of what it was, and stops where a batch has twice the first loss.

    Args:
        trainer: With the options :data:`dtpvit.tasks.trials.TRIAL`.
        task: Has one optimizer, and ``learning_rate`` or ``lr`` among its hyper-parameters.
        data: To train on; None if the task has its own.
        min_lr: The first base rate.
        max_lr: The last; the sweep ends before it if the loss is no number, or five times in a row above four times
            what it was at the start.
        num_training: Optimizer steps.

    Raises:
        UserError: If these do not make a sweep, or the task has no learning rate to scale.
    """
    check_sweep(task, min_lr, max_lr, num_training)
    sweep = _Sweep(float(task.hparams[rate_name(task)]), trainer)
    with trial_of(task, sweep.record) as trial:
        trial.configure_optimizers = sweep.configured(trial.configure_optimizers)
        trial.optimizer_step = sweep.scaled(trial.optimizer_step)
        Tuner(trainer).lr_find(
            trial,
            datamodule=data,
            min_lr=min_lr,
            max_lr=max_lr,
            num_training=num_training,
            early_stop_threshold=None,
            update_attr=False,
        )
    if not sweep.losses:
        raise UserError("no step of the range test gave a loss; look at the training data and at training_step.")
    return RateCurve(tuple(sweep.rates[: len(sweep.losses)]), tuple(sweep.losses))


def check_sweep(task: LightningModule, min_lr: float, max_lr: float, num_training: int) -> None:
    """Refuse, before any work, what :func:`find_learning_rate` cannot do.

    Raises:
        UserError: In a sentence about the first obstacle.
    """
    if not 0 < min_lr < max_lr:
        raise UserError(f"the learning rate would go from {min_lr:g} to {max_lr:g}; give 0 < min_lr < max_lr.")
    if num_training < RateCurve.FEWEST:
        raise UserError(f"num_training is {num_training}; a curve needs at least {RateCurve.FEWEST} steps.")
    name = rate_name(task)
    if not task.hparams[name] > 0:
        raise UserError(f"{name} is {task.hparams[name]:g}, of which no group has a multiple; give any rate above 0.")


def rate_name(task: LightningModule) -> str:
    """``learning_rate`` or ``lr``, whichever is a hyper-parameter of ``task``.

    Raises:
        UserError: If neither is.
    """
    for name in ("learning_rate", "lr"):
        if name in task.hparams:
            return name
    raise UserError(f"{type(task).__name__} has no hyper-parameter learning_rate or lr; give it one to tune.")


class _Sweep:
    """What the sweep did: the base rate and the loss of every optimizer step."""

    def __init__(self, base: float, trainer: Trainer) -> None:
        self.base, self.trainer = base, trainer
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._pieces: list[float] = []
        self._ratios: list[float] = []

    def configured(self, configure: Callable[[], Any]) -> Callable[[], Any]:
        """``configure_optimizers``, from which the ratios are taken before the tuner gives all groups one rate."""

        def configure_optimizers() -> Any:
            made = configure()
            optimizer = made["optimizer"] if isinstance(made, dict) else made
            if not isinstance(optimizer, Optimizer):
                raise UserError("a learning rate can be found for a task with one optimizer; this one has several.")
            # A schedule has put its first rate in place of the group's own and kept that one as initial_lr.
            self._ratios = [float(group.get("initial_lr", group["lr"])) / self.base for group in optimizer.param_groups]
            return made

        return configure_optimizers

    def scaled(self, step: Callable[..., None]) -> Callable[..., None]:
        """``optimizer_step``, for which the one rate that the tuner has given is the base rate."""

        def optimizer_step(epoch: int, batch_idx: int, optimizer: Optimizer, closure: Any = None) -> None:
            self.rates.append(float(optimizer.param_groups[0]["lr"]))
            for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
                group["lr"] = self.rates[-1] * ratio
            step(epoch, batch_idx, optimizer, closure)
            for group in optimizer.param_groups:
                group["lr"] = self.rates[-1]

        return optimizer_step

    def record(self, outputs: Any) -> None:
        """Take a batch's loss, the mean over all ranks; an optimizer step has that of all batches accumulated."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        whole = loss.detach().float() * self.trainer.accumulate_grad_batches  # Lightning has divided it
        self._pieces.append(float(torch.as_tensor(self.trainer.strategy.reduce(whole, reduce_op="mean"))))
        if len(self.rates) > len(self.losses):
            self.losses.append(sum(self._pieces) / len(self._pieces))
            self._pieces.clear()
            self.trainer.should_stop = self._exploded()

    def _exploded(self) -> bool:
        start = sum(self.losses[:5]) / len(self.losses[:5])
        return not math.isfinite(self.losses[-1]) or min(self.losses[-5:]) > start + 3 * abs(start)
