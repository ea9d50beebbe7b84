"""CLIP-style contrastive pretraining of an image and a text tower on pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, ClipLoss
from open_clip.loss import SigLipLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from dtpvit.encoder import Encoding, ImageEncoder
from dtpvit.encoder.ops.noise import draw_seeds
from dtpvit.errors import UserError
from dtpvit.interop.create import build_clip
from dtpvit.interop.loading import Tokenize
from dtpvit.interop.model_config import model_config, with_vision
from dtpvit.tasks.accumulation import Batch, CachedStep, Features, average_gradients, joint_thresholds
from dtpvit.tasks.contrastive_validation import ContrastiveValidation
from dtpvit.tasks.image_task import ImageTask
from dtpvit.tasks.optimization import decay_groups, optimizer_and_schedule
from dtpvit.tasks.skipped_samples import log_validation
from dtpvit.tasks.token_count import TokenCount

__all__ = ["Contrastive"]

logger = logging.getLogger(__name__)


class Contrastive(ImageTask):
    """Trains a dual encoder on image-text pairs; validates by zero-shot classification and retrieval.

    The loss is open_clip's: softmax over the batch (Radford et al. 2021), or, for models with a logit bias, sigmoid
    over pairs (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023).

    Args:
        model: A name such as ``DTP-ViT-B-32-10x``, or a config (:mod:`dtpvit.interop.model_config`).
        init: Dense weights to start from: a file, a timm model name, or open_clip's ``MODEL:TAG``.
        learning_rate: At the end of the warm-up.
        weight_decay: Of matrices.
        betas: Of Adam.
        eps: Of Adam.
        warmup_steps: Steps of linear warm-up; the cosine to 0 ends with the run.
        optimizer: A name of timm's optimizers.
        accum_freq: Pieces a batch is worked through in, for batches larger than memory; negatives and gradients
            stay those of the whole batch.
        local_loss: Under several processes, each computes only its own rows of the logits; needs gather_with_grad.
        gather_with_grad: Let gradients flow through the gathered features of other processes.
        grad_checkpointing: Recompute blocks in the backward pass.
        max_nonfinite: Steps with a NaN or infinite loss, in a row, after which the run stops.
        vision: Entries of the vision config instead of the model's, such as other ``reducers``, or another ``encoder``.

    Raises:
        UserError: If the model does not build or an argument does not fit.
    """

    learns_from_batch = True

    def __init__(
        self,
        model: str | dict[str, Any],
        init: str | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        warmup_steps: int = 2000,
        optimizer: str = "adamw",
        accum_freq: int = 1,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        grad_checkpointing: bool = False,
        max_nonfinite: int = 20,
        vision: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if local_loss and not gather_with_grad:
            raise UserError("local_loss without gather_with_grad gives wrong gradients; set both or neither")
        if accum_freq < 1:
            raise UserError(f"accum_freq is {accum_freq}; expected at least 1")
        if vision is not None:
            model = with_vision(model, vision)
        self.save_hyperparameters(ignore=["vision"])
        self.hparams["model"] = model  # under the command line Lightning saves the config's, whatever --reducers said
        self.config = model_config(model)
        self.model = build_clip(self.config)
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.tokenize = Tokenize(self.model.context_length)
        self.prepare(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, max_nonfinite)
        self.validation = ContrastiveValidation()
        self._cached: CachedStep | None = None

    @property
    def trunk(self) -> ImageEncoder:
        return self.model.visual.trunk

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.trainer.ckpt_path is None:
            self.start_from_init()
        rates = {getattr(reducer, "rate", None) for reducer in self.model.visual.trunk.reducers.values()}
        if self.hparams["accum_freq"] > 1 and "ratio" in rates:
            raise UserError("the rate loss 'ratio' is of a whole batch and accum_freq cuts it; use another or 1")
        world, rank = self.trainer.world_size, self.trainer.global_rank
        if self.model.logit_bias is not None:
            self.loss: nn.Module = SigLipLoss(rank=rank, world_size=world)
            return
        self.loss = ClipLoss(
            local_loss=self.hparams["local_loss"],
            gather_with_grad=self.hparams["gather_with_grad"],
            cache_labels=True,
            rank=rank,
            world_size=world,
        )

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.hparams["accum_freq"] > 1 and self._distributed:
            # The second pass runs outside DDP's forward, so its gradients are averaged here, once.
            self.trainer.strategy.model.require_backward_grad_sync = False  # pyright: ignore

    @property
    def chance_loss(self) -> float | None:
        size = getattr(self.trainer.train_dataloader, "batch_size", None)
        return math.log(size * self.trainer.world_size) if size and self.model.logit_bias is None else None

    @property
    def _distributed(self) -> bool:
        return self.trainer.world_size > 1

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """The dual encoder on normalised images and token ids, see :meth:`DualEncoder.forward`."""
        return self.model(images, text)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        pieces = self.hparams["accum_freq"]
        if pieces == 1:
            features = self._features(batch, {})
        else:
            features = self._cached_features(batch, pieces)
        loss = self._contrastive_loss(features.image, features.text)
        self.log("train/contrastive_loss", loss.detach())
        loss = loss + features.penalty
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/logit_scale", self.model.logit_scale.detach().exp())
        return {"loss": loss, "token_count": features.count}

    def _contrastive_loss(self, image: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            inputs = [image.float(), text.float(), self.model.logit_scale.exp()]
            if self.model.logit_bias is not None:
                inputs.append(self.model.logit_bias)
            return self.loss(*inputs)

    def _features(self, batch: Batch, thresholds: Mapping[int, Tensor]) -> Features:
        images = self.normalise(batch["image"])
        image, encoding = self.model.visual.encode(images, seeds=batch.get("seed"), thresholds=thresholds)
        text = self.model.encode_text(batch["text"], normalize=True)
        self._log_encoding(encoding)
        penalty = torch.stack([*encoding.losses.values(), image.new_zeros(())]).sum()
        return Features(normalize(image, dim=-1), text, penalty, TokenCount.of(encoding))

    def _cached_features(self, batch: Batch, pieces: int) -> Features:
        """Features of the whole batch, detached from the parameters; :meth:`backward` connects them again."""
        batch = dict(batch)
        if "seed" not in batch:
            batch["seed"] = draw_seeds(len(batch["image"]), self.device)
        size = math.ceil(len(batch["image"]) / pieces)
        split = {name: value.split(size) for name, value in batch.items() if isinstance(value, Tensor)}
        micro: list[Batch] = [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]
        images = [self.normalise(piece["image"]) for piece in micro]
        thresholds = joint_thresholds(self.model.visual.trunk, images, [piece["seed"] for piece in micro])
        self._cached = CachedStep(micro, self._features, thresholds)
        share = torch.tensor([len(piece["image"]) for piece in micro], device=self.device) / len(batch["image"])
        penalty = (self._cached.penalty * share).sum()
        return Features(self._cached.image, self._cached.text, penalty, self._cached.count)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        if self._cached is not None:
            self._cached.backward(self.trainer.precision_plugin.forward_context)
            self._cached = None
            if self._distributed and not self.is_sharded:
                average_gradients(self.parameters())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Not when the batch ends, before which checkpoints are written and averages of weights taken.
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, math.log(100))

    def _log_encoding(self, encoding: Encoding) -> None:
        second_pass = self._cached is not None
        if not self.training or self._trainer is None or second_pass:
            return
        self.log_reduction(encoding)

    def on_validation_epoch_start(self) -> None:
        self.validation.start(self)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation.step(self, batch)

    def on_validation_epoch_end(self) -> None:
        log_validation(self, self.validation.results(), shown=("zeroshot_acc1", "text_retrieval_recall@1"))

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end
    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Normalised image features, shape (B, embed_dim), tokens of each image and, for pairs, text features."""
        image, encoding = self.model.visual.encode(self.normalise(batch["image"]))
        found = {"image_features": normalize(image, dim=-1), "tokens": encoding.tokens.lengths}
        if "text" in batch:
            found["text_features"] = self.model.encode_text(batch["text"], normalize=True)
        return found

    def configure_optimizers(self) -> Any:
        groups = decay_groups(self.named_parameters(), self.hparams["weight_decay"])
        return optimizer_and_schedule(self, groups)
