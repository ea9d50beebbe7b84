"""What all tasks on images share: first weights, pixels, the guard around a step, reduction, names in checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dtpvit.encoder import DualEncoder, Encoding, ImageEncoder
from dtpvit.interop.checkpoint_format import FORMAT, FORMAT_KEY, migrate
from dtpvit.interop.dense_weights import Transfer, load_dense
from dtpvit.interop.weight_files import up_to_date
from dtpvit.tasks.accumulation import average_gradients
from dtpvit.tasks.checkpoint_names import use_model_names
from dtpvit.tasks.optimization import NonFiniteGuard, clip_shards
from dtpvit.tasks.resuming import continue_data
from dtpvit.tasks.skipped_samples import check_skipped, report_skipped
from dtpvit.tasks.suspects import Suspects

__all__ = ["ImageTask"]

logger = logging.getLogger(__name__)
_CHECKED_EVERY = 64  # batches
_COUNTS = ("skipped", "in_a_row", "searched")  # of the guard, that checkpoints keep


class ImageTask(lightning.LightningModule):
    """Base of the tasks. Checkpoints have the names of ``model`` alone, so that open_clip or timm loads them as is.

    Attributes:
        learns_from_batch: Whether a sample's loss depends on the others in its batch.
        judged_on: What was last said of the samples that a validation was of.
    """

    learns_from_batch = False
    judged_on = ""

    pixel_mean: Tensor
    pixel_std: Tensor

    def prepare(self, mean: Sequence[float], std: Sequence[float], max_nonfinite: int) -> None:
        """To be called by the constructor.

        Args:
            mean: Channel means on [0, 1].
            std: Channel standard deviations, likewise.
            max_nonfinite: Steps with a NaN or infinite loss, in a row, after which the run stops.
        """
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.guard, self.suspects = NonFiniteGuard(max_nonfinite), Suspects()
        self._last_loss = torch.zeros(())
        use_model_names(self)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP leaves alone: buffers, which all ranks change alike.

        It would broadcast them before each step, and once more in a validation, where a rank that has left its batches
        out is waited for in vain.
        """
        return [name for name, _ in self.named_buffers()]

    @property
    def trunk(self) -> ImageEncoder:
        """The encoder inside the model."""
        raise NotImplementedError

    def start_from_init(self) -> Transfer | None:
        """Take the dense weights that ``init`` names, if it names any, and log what became of each tensor.

        Raises:
            UserError: If they cannot be read or do not fit.
        """
        if self.hparams["init"] is not None:
            assert isinstance(self.model, ImageEncoder | DualEncoder)
            transfer = load_dense(self.model, self.hparams["init"])
            logger.info("%s", transfer)
            return transfer
        return None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was made for."""
        height, width = self.trunk.image_size
        return height, width

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps over which the learning rate rises."""
        if "warmup_steps" in self.hparams:
            return int(self.hparams["warmup_steps"])
        return round(self.hparams["warmup_ratio"] * self.trainer.estimated_stepping_batches)

    @property
    def chance_loss(self) -> float | None:
        """What a model loses that gives every input the same answer; None where that is not known."""
        return None

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images, shape (B, 3, H, W), to what the model takes."""
        return (images.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std

    def log_reduction(self, encoding: Encoding) -> None:
        """Log tokens an image, boundary rates and the reducers' losses of a training batch."""
        size = encoding.tokens.layout.batch
        self.log("train/tokens", encoding.tokens.layout.total / size, prog_bar=True, batch_size=size)
        for block, compression in encoding.compression.items():
            self.log(f"train/boundary_rate/block{block}", 1 / compression, batch_size=size)
        for name, loss in encoding.losses.items():
            self.log(f"train/{name}", loss.detach(), batch_size=size)

    def on_train_start(self) -> None:
        continue_data(self.trainer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._last_loss = loss.detach()
        super().backward(loss, *args, **kwargs)

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are cut between the ranks (:mod:`dtpvit.tasks.sharding`)."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.suspects.see(batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # once a step, however many batches it gathers
        if self.is_sharded:
            average_gradients(parameter for parameter in self.parameters() if not isinstance(parameter, DTensor))
        self.trunk.after_backward()
        if self.guard.after_backward(self._last_loss, self.parameters(), scale=self._loss_scale):
            self.suspects.acquit()
        else:
            self.suspects.keep(epoch=self.current_epoch, step=self.global_step, loss=self._last_loss)
            self.guard.give_up(self._list_suspects() if self.guard.in_a_row >= self.guard.patience else "")
        if self.guard.skipped:
            self.log("train/skipped_steps", float(self.guard.skipped))
        if self.guard.searched:
            self.log("train/scaler_skipped_steps", float(self.guard.searched))

    @property
    def _loss_scale(self) -> float | None:
        """Of the gradient scaler (fp16), which DeepSpeed keeps to itself; None without one."""
        if self.trainer.precision != "16-mixed":
            return None
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return math.inf if scaler is None else scaler.get_scale()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # At the first few batches, which are long in coming if hardly a sample can be used, and at times from then on.
        number = batch_idx + 1
        if number % _CHECKED_EVERY == 0 or number.bit_count() == 1:
            check_skipped(self)

    def _list_suspects(self) -> str:
        path = Path(self.trainer.default_root_dir) / f"nonfinite-rank{self.global_rank}.jsonl"
        return f"; the samples of these steps are listed in {path}" if self.suspects.write(path) else ""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[FORMAT_KEY] = FORMAT
        checkpoint["nonfinite"] = {name: getattr(self.guard, name) for name in _COUNTS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        migrate(checkpoint, "the checkpoint")
        for name in _COUNTS:
            setattr(self.guard, name, checkpoint.get("nonfinite", {}).get(name, 0))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Self:  # pyright: ignore
        """Lightning's; an older checkpoint is brought up to date before the task is built by the options in it."""
        if isinstance(checkpoint_path, str | Path) and options.get("weights_only") is not False:
            checkpoint_path = up_to_date(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **options)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.is_sharded and gradient_clip_val:
            clip_shards(self.parameters(), gradient_clip_val, gradient_clip_algorithm or "norm")
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        report_skipped(self)
        check_skipped(self)
