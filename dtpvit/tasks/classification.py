"""Image classification: probing, adapting or fine-tuning an encoder, with or without a dense teacher."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtpvit.encoder import Encoding, ImageEncoder, VisionEncoder
from dtpvit.encoder.ops.noise import draw_seeds
from dtpvit.errors import UserError
from dtpvit.evaluation.agreement import dense_output, divergence
from dtpvit.evaluation.cost import image_macs
from dtpvit.interop.image_models import create_classifier, vision_config
from dtpvit.interop.model_config import replaced
from dtpvit.tasks.classification_options import check_labels, check_options, with_options
from dtpvit.tasks.classification_validation import ClassificationValidation
from dtpvit.tasks.distillation import Teacher, TeacherOptions
from dtpvit.tasks.feature_cache import EncodedImages, FeatureCache
from dtpvit.tasks.image_task import ImageTask
from dtpvit.tasks.learning_modes import CompressionWarmup, Mode, freeze, set_training
from dtpvit.tasks.mixing import Mixing, MixingOptions, seed_of_batch
from dtpvit.tasks.optimization import layer_groups, optimizer_and_schedule
from dtpvit.tasks.skipped_samples import log_validation
from dtpvit.tasks.token_count import TokenCount

__all__ = ["Classification"]

logger = logging.getLogger(__name__)
Batch = Mapping[str, Any]


class Classification(ImageTask):
    """Trains a classifier on labelled images; validates by accuracy, tokens and multiply-accumulates an image.

    Batches are ``{"image": uint8 (B, 3, H, W), "label": int64 (B,), "seed": int64 (B,)}``; without ``seed`` the noise
    of reducers and mixing is drawn from torch's generator. A checkpoint has the timm model's names and loads there.

    Args:
        model: timm's name of a dense model, one of ours, or a vision config (:mod:`dtpvit.interop.image_models`).
        num_classes: At least 2.
        init: Dense weights to start from: a file (a checkpoint of ours too, of which the image tower is taken), a timm
            model name, or open_clip's ``MODEL:TAG``. Its classifier is kept where its shape fits.
        mode: ``"adapt"``: the reducers learn to keep the logits of the same model without them, from no label;
            ``"linear_probe"``: the head learns on the frozen trunk's features; ``"frozen"``: head and reducers learn
            inside the frozen trunk; ``"finetune"``: everything learns.
        cache_features: In linear probing, encode every image once only (:class:`.feature_cache.FeatureCache`); the
            data module must not augment (``augments``, if it has that attribute, says whether it does), which
            :class:`dtpvit.datamodules.labelled_images.LabelledImages` leaves with ``augment: false``.
        mean: Channel means on [0, 1]; None takes those of the model's preset.
        std: Channel standard deviations, likewise.
        learning_rate: Of the head, at the end of the warm-up.
        weight_decay: Of matrices.
        betas: Of Adam.
        eps: Of Adam.
        warmup_steps: Steps of linear warm-up; the cosine to 0 ends with the run.
        optimizer: A name of timm's optimizers.
        layer_decay: Factor on the learning rate from each block to the one before it.
        predictor_lr_scale: Learning rate of the reducers over that of the head.
        compression_warmup: Steps over which the reducers go from keeping everything to their target, compression
            linearly, a keep rate along half a cosine.
        compression_delay: Steps before those, in which everything is kept.
        label_smoothing: Share of the target spread over all classes.
        binary_cross_entropy: Each class a question of its own (Wightman et al., "ResNet strikes back", 2021).
        mixing: Mixup, CutMix and random erasing, arguments of :class:`dtpvit.tasks.mixing.Mixing`.
        teacher: A dense model to learn from, arguments of :class:`dtpvit.tasks.distillation.Teacher`.
        grad_checkpointing: Recompute blocks in the backward pass.
        max_nonfinite: Steps with a NaN or infinite loss, in a row, after which the run stops.
        vision: Entries of the vision config instead of the model's, such as other ``reducers``, or another ``encoder``.

    Raises:
        UserError: If the model does not build or an argument does not fit.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        num_classes: int,
        init: str | None = None,
        mode: Mode = "finetune",
        cache_features: bool = False,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_steps: int = 500,
        optimizer: str = "adamw",
        layer_decay: float = 1.0,
        predictor_lr_scale: float = 1.0,
        compression_warmup: int = 0,
        compression_delay: int = 0,
        label_smoothing: float = 0.0,
        binary_cross_entropy: bool = False,
        mixing: MixingOptions | None = None,
        teacher: TeacherOptions | None = None,
        grad_checkpointing: bool = False,
        max_nonfinite: int = 20,
        vision: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if vision is not None:
            model = replaced(vision_config(model), vision)
        self.save_hyperparameters(ignore=["vision"])
        self.hparams["model"] = model  # under the command line Lightning saves the config's, whatever --reducers said
        self.mode: Mode = mode
        self.num_classes = num_classes
        built = create_classifier(model, num_classes, mean, std)
        self.model = built.model
        self.model.set_grad_checkpointing(grad_checkpointing)
        freeze(self.model, mode)
        self.prepare(built.mean, built.std, max_nonfinite)
        self.mixing = with_options(Mixing, mixing, num_classes, smoothing=label_smoothing)
        check_options(self.hparams)
        self.compression = CompressionWarmup(self.model, compression_warmup, compression_delay)
        smoothing = 0.0 if self.mixing.mixup is not None else label_smoothing  # mixed targets are smoothed already
        self.loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=smoothing)
        if binary_cross_entropy:
            self.loss = BinaryCrossEntropy(smoothing=smoothing)
        self.validation = ClassificationValidation(num_classes)
        self._teacher: Teacher | None = None
        self._cache: FeatureCache | None = None
        self._epochs_seen = 0

    @property
    def trunk(self) -> ImageEncoder:
        return self.model

    @property
    def chance_loss(self) -> float | None:
        plain = self.mode != "adapt" and self.hparams["teacher"] is None and not self.hparams["binary_cross_entropy"]
        return math.log(self.num_classes) if plain else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of normalised images, shape (B, 3, H, W)."""
        return self.model(images)

    def train(self, mode: bool = True) -> Classification:
        super().train(mode)
        if mode:
            set_training(self.model, self.mode)
        return self

    def setup(self, stage: str) -> None:
        # Lightning warns whoever has this hook beside a data module, that it is used: it is meant to be.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
        if stage != "fit":
            return
        if self.trainer.ckpt_path is None:
            transfer = self.start_from_init()
            if self.mode == "adapt" and (transfer is None or "visual.trunk.head.weight" not in transfer.taken):
                raise UserError("adapt keeps the answers of a trained classifier; give init with one of these classes")
        if self.hparams["teacher"] is not None:
            self._teacher = with_options(Teacher, self.hparams["teacher"], self.model)

    def on_fit_start(self) -> None:
        if self.hparams["cache_features"]:
            data: Any = getattr(self.trainer, "datamodule", None)
            if getattr(data, "augments", False):
                raise UserError(
                    "cache_features needs images that stay the same in every epoch, and the data module augments them; "
                    "switch its augmentation off (LabelledImages: --data.init_args.augment false), or cache_features"
                )
            self._cache, self._epochs_seen = FeatureCache(), 0

    def on_train_start(self) -> None:
        self.train()  # Lightning leaves every part in the mode it was constructed in
        if self._teacher is not None:  # not when the fit starts: Lightning's tuner trains before that
            self._teacher.to(self.device)
        super().on_train_start()

    def on_fit_end(self) -> None:
        self._cache = self._teacher = None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """What must be done on the host: check labels, seed the mixing, look features up."""
        if not isinstance(batch, Mapping) or "image" not in batch:
            return batch
        batch = dict(batch)
        if "label" in batch:
            check_labels(batch["label"], self.num_classes)
        if self.trainer.training and self.mixing.active:
            seeds = batch.get("seed")
            batch["mix_seed"] = seed_of_batch(draw_seeds(1, torch.device("cpu")) if seeds is None else seeds)
        return batch if self._cache is None else self._cache.look_up(batch, training=self.trainer.training)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.compression.set(self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        if self.mode == "linear_probe" and self._teacher is None and not self.mixing.active:
            return self._probing_step(batch)
        images, target = self.mixing(self.normalise(batch["image"]), batch["label"], batch.get("mix_seed", 0))
        encoding = self._encode(images, batch.get("seed"))
        logits = self.model.head(encoding.pooled)
        if self.mode == "adapt":
            assert isinstance(self.model, VisionEncoder)  # no other has reducers to learn, so that freeze refuses
            loss = divergence(logits, dense_output(self.model, images, self.model.head), classes=True).mean()
        else:
            loss = self._classification_loss(logits, target)
        if self._teacher is not None:
            pixels = (images * self.pixel_std + self.pixel_mean) / 255
            loss, parts = self._teacher.teach(loss, logits, encoding, pixels)
            for name, value in parts.items():
                self.log(f"train/{name}", value.detach(), batch_size=len(images))
        loss = torch.stack([loss, *encoding.losses.values()]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        self.log_reduction(encoding)
        return {"loss": loss, "token_count": TokenCount.of(encoding)}

    def _probing_step(self, batch: Batch) -> dict[str, Any]:
        made = self._frozen_features(batch)
        loss = self._classification_loss(self.model.head(made.features), batch["label"])
        size = len(made.features)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        lengths = made.tokens.tolist()
        patches, prefix = size * self.model.grid_size[0] * self.model.grid_size[1], size * self.model.num_prefix_tokens
        total = sum(lengths)
        count = TokenCount(size, patches, total, total - prefix, max(lengths), made.tokens.min())
        return {"loss": loss, "token_count": count}

    def _encode(self, images: Tensor, seeds: Tensor | None = None) -> Encoding:
        if self.mode == "linear_probe" or not self.training:
            # A reducer that always draws takes its seed from the pixels, as it will in use.
            with torch.no_grad():
                return self.model.encode(images)
        return self.model.encode(images, seeds=seeds)

    def _frozen_features(self, batch: Batch) -> EncodedImages:
        def encode(images: Tensor) -> EncodedImages:
            encoding = self._encode(self.normalise(images))
            macs = image_macs(self.model, encoding, self.num_classes)
            return EncodedImages(encoding.pooled, encoding.tokens.lengths, macs)

        return encode(batch["image"]) if self._cache is None else self._cache.complete(dict(batch), encode)

    def _classification_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.loss(logits.float(), target)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self._cache is not None:
            self._cache.end_epoch(first=self._epochs_seen == 0)
            self._epochs_seen += 1

    def on_validation_epoch_start(self) -> None:
        self.validation.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        made = self._frozen_features(batch)
        logits = self.model.head(made.features).float()
        loss = cross_entropy(logits, batch["label"], reduction="none")
        self.validation.update(logits, batch["label"], loss, made.tokens, made.macs)

    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        log_validation(self, self.validation.results(), shown=("acc1",), stage=stage)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end
    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Logits and probabilities, shape (B, num_classes), and tokens of each image, shape (B,)."""
        made = self._frozen_features(batch)
        logits = self.model.head(made.features).float()
        alone = self.hparams["binary_cross_entropy"]
        return {
            "logits": logits,
            "probabilities": logits.sigmoid() if alone else logits.softmax(1),
            "tokens": made.tokens,
        }

    def configure_optimizers(self) -> Any:
        options = self.hparams
        rates = {name: options[name] for name in ("learning_rate", "weight_decay", "layer_decay", "predictor_lr_scale")}
        return optimizer_and_schedule(self, layer_groups(self.model, **rates))
