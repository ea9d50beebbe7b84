"""An exponential moving average of the weights, validated and kept in place of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dtpvit.errors import UserError
from dtpvit.tasks.shards import cut_again, cut_like, joined, local, whole

__all__ = ["WeightAverage"]

logger = logging.getLogger(__name__)


class WeightAverage(Callback):
    """Averages what learns; validation and the ``state_dict`` of checkpoints have the average.

    Training goes on from the weights that the checkpoint keeps beside it. In place of Lightning's callback of this
    kind, which copies the whole task: frozen weights and buffers, such as the calibrated threshold of a boundary
    predictor, are not averaged; of a parameter that is cut between the ranks (:mod:`dtpvit.tasks.sharding`) each rank
    averages its share; the average starts from the weights that ``init`` gave; it is kept in float32 at least, for in
    bfloat16 a small step towards the weights is none; and a ``last.ckpt`` written when training ends can be continued.

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
        self.decay, self.start_step, self.device = decay, start_step, device
        self._latest_update_step = 0
        self._average: dict[str, Tensor] | None = None  # of each parameter that learns, this rank's part
        self._aside: dict[str, Tensor] = {}  # the weights, while the model has the average

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """There is an average in ``fit`` alone; elsewhere a checkpoint's weights are taken as they are."""
        self._average = {} if stage == "fit" else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin from the weights of now, unless a checkpoint has brought an average."""
        assert self._average is not None
        if not self._average:
            self._take_in(pl_module, decay=0.0)
        for name, average in self._average.items():
            self._average[name] = average.to(self.device or pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's weights in, or before ``start_step`` follow them."""
        if trainer.global_step > self._latest_update_step:
            self._take_in(pl_module, self.decay if trainer.global_step > self.start_step else 0.0)
            self._latest_update_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model, before a strategy gathers it."""
        self._aside = _exchanged(pl_module, self._average or {})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back: the others' share of the average, which a strategy has gathered, is let go."""
        if self._aside:
            cut_again(pl_module)
            _exchanged(pl_module, self._aside)
            self._aside = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model: not at the end of training, when a checkpoint may still be written."""
        _exchanged(pl_module, self._average or {})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average."""
        self._average, self._aside = None, {}

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average under ``state_dict`` and the weights to go on from beside it, in a validation too."""
        if self._average is None:
            return
        state, entries = checkpoint["state_dict"], list(self._entries(pl_module))
        for place, values in (("current_model_state", self._aside), ("state_dict", self._average)):
            own = {key: whole(joined(now, values[name])) for key, name, now in entries if name in values}
            checkpoint[place] = state | own

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue both; without an average in the checkpoint begin from its weights."""
        if self._average is None:
            return
        self._take_in(pl_module, decay=0.0)
        if "current_model_state" not in checkpoint:
            logger.info("the checkpoint has no average of the weights; it begins from the weights themselves")
            return
        for key, name, now in self._entries(pl_module):
            self._average[name].copy_(local(cut_like(now, checkpoint["state_dict"][key])))
        weights = {"state_dict": checkpoint["current_model_state"]}
        trainer.strategy.load_model_state_dict(weights, strict=pl_module.strict_loading)

    @torch.no_grad()
    def _take_in(self, module: nn.Module, decay: float) -> None:
        """Move the average towards the weights of now; with a decay of 0 onto them."""
        assert self._average is not None
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        for name, now in _learning(module):
            average = self._average.get(name)
            if average is None:
                dtype = torch.promote_types(now.dtype, torch.float32)
                self._average[name] = now.to(self.device or now.device, dtype, copy=True)
            elif (average.dtype, average.device) == (now.dtype, now.device):
                averages.append(average)
                weights.append(now)
            else:
                average.lerp_(now.to(average), 1 - decay)
        if averages:
            get_ema_multi_avg_fn(decay)(averages, weights, 0)

    def _entries(self, module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
        """Name in checkpoints, name in the module and weights of each parameter that is averaged."""
        state = module.state_dict(keep_vars=True)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for key, value in state.items():
            name = names.get(id(value))
            if name is not None and name in (self._average or {}):
                yield key, name, value.detach()


def _learning(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each parameter that learns."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, local(parameter.detach())


@torch.no_grad()
def _exchanged(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put values into the module; what was there before them."""
    before: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if name in values:
            now = local(parameter)
            before[name] = now.clone()
            now.copy_(values[name])
    return before
