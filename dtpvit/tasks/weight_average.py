"""An exponential moving average of the weights, validated and kept in place of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dtpvit.errors import UserError

__all__ = ["WeightAverage"]


class WeightAverage(WeightAveraging):
    """Lightning's callback with what this project's runs need beyond it.

    Validation and the ``state_dict`` of checkpoints have the average; training goes on from the weights that the
    checkpoint keeps beside it. Beyond Lightning's ``EMAWeightAveraging``: buffers, such as the calibrated threshold of
    a boundary predictor, are copied, since no average of two thresholds gives the rate of either; the average starts
    from the weights that ``init`` gave; it is kept on the device of the model; frozen weights stay what they are to
    the bit; and a ``last.ckpt`` written when training ends can still be continued.

    Args:
        decay: Share of the old average in the new one, each optimizer step.
        start_step: Optimizer steps before the average begins; until then it is the weights themselves.
        device: Where the average is kept; None keeps it beside the model.

    Raises:
        UserError: If the decay is not in [0, 1).
    """

    def __init__(self, decay: float = 0.9998, start_step: int = 0, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"the decay of the weight average is {decay}; expected at least 0 and less than 1")
        super().__init__(device=device, use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.start_step = start_step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin from the weights of now, unless a checkpoint has brought an average."""
        assert self._average_model is not None
        self._average_model.to(self._device or pl_module.device)
        if self._average_model.n_averaged == 0:
            self._follow(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's weights in, or before ``start_step`` follow them."""
        assert self._average_model is not None
        if trainer.global_step > self.start_step:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.global_step > self._latest_update_step:
            self._follow(pl_module)
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def _follow(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        average = self._average_model.module
        for mine, current in ((average.parameters(), pl_module.parameters()), (average.buffers(), pl_module.buffers())):
            for tensor, now in zip(mine, current, strict=True):
                tensor.copy_(now)
        # Where it is 0, torch would overwrite the average with the weights of the first step.
        self._average_model.n_averaged.fill_(1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing yet: a checkpoint may still be written, and must hold the weights to go on from."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._copy_average_to_current(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average, so that a test that follows takes a checkpoint's weights as they are."""
        self._average_model = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average under ``state_dict`` and the weights to go on from beside it."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue both; outside of ``fit`` the average is all that is wanted, and it is there already."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
