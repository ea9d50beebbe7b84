"""Telling a learning rate that is too high, early, by the loss alone."""

from __future__ import annotations

import logging
import math
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dtpvit.errors import UserError
from dtpvit.tasks.image_task import ImageTask

__all__ = ["LossWatch", "Window", "rise"]

logger = logging.getLogger(__name__)

_WINDOW = 20
_SHORTEST = 60
_HIGHER, _LOWER = 4.0, -2.0  # standard errors of the difference
_UNTRAINED = 0.99


class Window(NamedTuple):
    """Losses of some steps in a row: their mean, its standard error, and the last step and its learning rate."""

    mean: float
    error: float
    step: int
    rate: float


def rise(windows: list[Window], horizon: int) -> tuple[Window, Window] | None:
    """The lowest window of the warm-up and the present one, if the loss has risen since and has not come back.

    A warm-up is a learning-rate range test (Smith, "Cyclical learning rates for training neural networks", 2017): the
    rate climbs to its height, and where it becomes too high, the loss climbs with it. So that chance does not decide,
    it must at some time since have been higher by four standard errors of the difference, and now, after as many steps
    at full rate as the warm-up had, be lower by no more than two.

    Args:
        windows: From the start.
        horizon: Steps of the warm-up.
    """
    early = [window for window in windows if window.step <= horizon]
    if not early:
        return None
    best, now = min(early), windows[-1]
    since = [window for window in windows if window.step > best.step]
    rose = any(_errors_above(window, best) > _HIGHER for window in since)
    return (best, now) if rose and _errors_above(now, best) > _LOWER else None


def _errors_above(window: Window, other: Window) -> float:
    return (window.mean - other.mean) / max(math.hypot(window.error, other.error), 1e-12)


class LossWatch(Callback):
    """Warns, once and again when training ends, that the loss says the learning rate is too high.

    Two signs, both of the training loss in means over 20 steps or a fifth of the warm-up: after twice the warm-up (at
    least 120 steps) it stands no lower than it already was in the warm-up, having risen (:func:`rise`); or, after four
    times the warm-up, not below what a model loses that tells nothing apart (:attr:`.ImageTask.chance_loss`). Runs
    that are shorter are not judged, nor are those whose compression rises by a schedule, which raises the loss.

    Args:
        stop: End the training instead, on all ranks, as soon as one sees it.

    Raises:
        UserError: With ``stop``, once the loss says so.
    """

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.stop = stop
        self.windows: list[Window] = []
        self.said = ""
        self._losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss; judge when a window is full."""
        if not isinstance(pl_module, ImageTask) or pl_module.hparams.get("compression_warmup"):
            return
        horizon = max(_SHORTEST, pl_module.warmup_steps)
        step = trainer.global_step
        if step > 4 * horizon + horizon // 5 + _WINDOW:
            return
        # Lightning has divided it by the number of batches that a step gathers.
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if len(self._losses) < max(_WINDOW, horizon // 5) * trainer.accumulate_grad_batches:
            return
        losses = [
            loss
            for loss in torch.stack([loss.to(pl_module.device) for loss in self._losses]).tolist()
            if math.isfinite(loss)
        ]
        self._losses = []
        told = ""
        if len(losses) > 1:
            rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
            self.windows.append(Window(fmean(losses), stdev(losses) / math.sqrt(len(losses)), step, rate))
            told = self._judgement(pl_module, horizon)
        if self.stop and trainer.strategy.reduce_boolean_decision(bool(told), all=False):
            raise UserError(told or "another rank's loss says that the learning rate is too high")
        if told and not self.said:
            self.said = told
            if trainer.is_global_zero:
                logger.warning("%s", told)

    def _judgement(self, task: ImageTask, horizon: int) -> str:
        """What the window that is now full gives to say, or nothing."""
        now, before = self.windows[-1], (self.windows[-2].step if len(self.windows) > 1 else 0)
        if before < 2 * horizon <= now.step and (found := rise(self.windows, horizon)):
            best = found[0]
            return (
                f"the learning rate is too high: the loss fell to {best.mean:.3f} by step {best.step}, at a rate of "
                f"{best.rate:.2g}, then rose, and is {now.mean:.3f} at step {now.step}, at {now.rate:.2g}; "
                f"give --model.init_args.learning_rate {best.rate / 2:.1g} or less, or see `dtpvit tune`"
            )
        if before < 4 * horizon <= now.step and (chance := task.chance_loss) and now.mean >= _UNTRAINED * chance:
            return (
                f"nothing has been learned by step {now.step}: the loss is {now.mean:.3f}, and {chance:.3f} is what a "
                f"model loses that tells nothing apart; the learning rate of {now.rate:.2g} is too high, or far too "
                "low: see `dtpvit tune`"
            )
        return ""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it again, where it is read."""
        if self.said and trainer.is_global_zero:
            logger.warning("mind what was said during training: %s", self.said)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was seen, for a run that goes on; of a callback's own state Lightning would miss the callback in
        `dtpvit validate`."""
        checkpoint["loss_watch"] = {
            "windows": [list(window) for window in self.windows],
            "losses": [float(loss) for loss in self._losses],
            "said": self.said,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on."""
        seen = checkpoint.get("loss_watch", {"windows": [], "losses": [], "said": ""})
        self.windows = [Window(*window) for window in seen["windows"]]
        self._losses = [torch.tensor(loss) for loss in seen["losses"]]
        self.said = seen["said"]
