"""Visual instruction tuning: a language model learns to answer from an image's tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dtpvit.encoder import ImageEncoder
from dtpvit.errors import UserError
from dtpvit.interop.chat import Template
from dtpvit.interop.dense_weights import Transfer, load_dense
from dtpvit.interop.image_models import vision_config
from dtpvit.interop.instruction_models import create_instruction_model, encoder_of, is_instruction, load_parts
from dtpvit.interop.language_model import added_adapters, checkpoint_activations
from dtpvit.interop.loading import difference
from dtpvit.interop.model_config import replaced
from dtpvit.interop.visual_language import Read, Select
from dtpvit.interop.weight_files import read_checkpoint, state_of
from dtpvit.tasks.image_task import ImageTask
from dtpvit.tasks.instruction_parts import TuneLanguage, TuneVision, freeze_parts, part_groups, set_part_modes
from dtpvit.tasks.instruction_validation import InstructionValidation
from dtpvit.tasks.optimization import optimizer_and_schedule
from dtpvit.tasks.skipped_samples import log_validation
from dtpvit.tasks.token_count import TokenCount

__all__ = ["Instruction"]

logger = logging.getLogger(__name__)
Batch = Mapping[str, Any]


class Instruction(ImageTask):
    """Trains a projector, and whatever else it is told to, on conversations about images; LLaVA-1.5's two stages.

    Batches are those of :class:`dtpvit.datamodules.instruction.InstructionData`. Stage 1 is as the defaults have it
    but for ``template: plain`` and a learning rate of 1e-3; stage 2 has ``tune_language_model: full``, 2e-5. A
    checkpoint holds the encoder, the projector and of the language model what has learned; the rest of that stays where
    it came from.

    The loss is the mean over the supervised tokens of all ranks' batches; with several batches an optimizer step
    (``accumulate_grad_batches``) the mean of theirs.

    Args:
        language_model: A folder as transformers writes it, or a name on the hub.
        encoder: timm's name of a dense model, one of ours, or a vision config
            (:mod:`dtpvit.interop.image_models`); None takes the one that the checkpoint ``init`` is of.
        init: Where to start: a checkpoint of this task (of stage 1 before stage 2), whose tensors are all taken; else
            weights of the encoder: a checkpoint of another task of ours, a file of dense weights, a timm model name, or
            open_clip's ``MODEL:TAG``.
        template: ``chatml``, ``vicuna_v1``, ``plain`` or ``tokenizer`` (:class:`dtpvit.interop.chat.Chat`).
        projector: ``linear`` or ``mlp2x_gelu``.
        position: Tell the language model where each token lies and how many patches it stands for.
        select: ``pooled`` tokens, or the patches before the first reducer, ``pre_pool``.
        select_layer: -1 is behind the final norm, -2 after the last block but one (LLaVA-1.5's), and so on.
        image_aspect: How images are made square: ``pad`` with the mean colour, ``crop`` or ``squash``.
        max_length: Most tokens of a conversation, images included; beyond, text is cut.
        mean: Channel means on [0, 1]; None takes those that the encoder's weights were trained with, if known.
        std: Channel standard deviations, likewise.
        tune_projector: Whether the projector learns.
        tune_language_model: ``frozen``, ``full`` or ``lora``.
        tune_vision: ``frozen``; ``reducers``, such as a boundary predictor; ``partial``, from block
            ``tune_vision_from`` on; or ``full``.
        tune_vision_from: First block that learns, of ``partial``.
        lora: Options of ``peft.LoraConfig`` over LLaVA-1.5's (rank 128, alpha 256, dropout 0.05).
        language_dtype: Of the language model's weights; a frozen one may well be ``bfloat16``.
        learning_rate: Of the language model, and of the other parts where these have none of their own.
        projector_lr: Of the projector.
        vision_lr: Of the encoder's last layers.
        layer_decay: Factor on the encoder's learning rate from each block to the one before it.
        predictor_lr_scale: Rate of the reducers over ``vision_lr``.
        weight_decay: Of matrices.
        betas: Of Adam.
        eps: Of Adam.
        warmup_ratio: Share of the run over which the rate rises linearly; half a cosine to 0 follows.
        optimizer: A name of timm's optimizers.
        grad_checkpointing: Recompute blocks of encoder and language model in the backward pass.
        max_nonfinite: Steps with a NaN or infinite loss, in a row, after which the run stops.
        vision: Entries of the vision config instead of the encoder's, such as other ``reducers``.

    Raises:
        UserError: If a part is not there, or an argument does not fit.
    """

    def __init__(
        self,
        language_model: str,
        encoder: str | dict[str, Any] | None = None,
        init: str | None = None,
        template: Template = "chatml",
        projector: str = "mlp2x_gelu",
        position: bool = False,
        select: Select = "pooled",
        select_layer: int = -1,
        image_aspect: str = "pad",
        max_length: int = 2048,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        tune_projector: bool = True,
        tune_language_model: TuneLanguage = "frozen",
        tune_vision: TuneVision = "frozen",
        tune_vision_from: int = 0,
        lora: dict[str, Any] | None = None,
        language_dtype: str = "float32",
        learning_rate: float = 1e-3,
        projector_lr: float | None = None,
        vision_lr: float | None = None,
        layer_decay: float = 1.0,
        predictor_lr_scale: float = 1.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_ratio: float = 0.03,
        optimizer: str = "adamw",
        grad_checkpointing: bool = False,
        max_nonfinite: int = 20,
        vision: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        found = _encoder(encoder, init, mean, std)
        if vision is not None:
            found["encoder"] = replaced(vision_config(found["encoder"]), vision)
        built = create_instruction_model(
            language_model=language_model,
            template=template,
            **found,
            image_aspect=image_aspect,
            max_length=max_length,
            language_dtype=language_dtype,
            projector=projector,
            position=position,
            select=select,
            select_layer=select_layer,
        )
        self.save_hyperparameters(ignore=["vision"])
        # Under the command line Lightning saves what the config says, whatever became of it here.
        self.hparams.update({name: built.config[name] for name in ("encoder", "mean", "std")})
        self.model, self.chat, self.config = built.model, built.chat, built.config
        self.image_fill, self.image_aspect = built.image_fill, image_aspect
        if tune_language_model == "lora":
            self.model.language_model = added_adapters(self.model.language_model, lora)
        freeze_parts(self.model, tune_projector, tune_language_model, tune_vision, tune_vision_from)
        if grad_checkpointing:
            self.model.vision.set_grad_checkpointing()
            checkpoint_activations(self.model.language_model)
        self.prepare(built.config["mean"], built.config["std"], max_nonfinite)
        words = self.model.language_model.named_parameters(remove_duplicate=False)
        self.learned_words = {name for name, parameter in words if parameter.requires_grad}
        self.register_state_dict_post_hook(_leave_out_what_stands_still)
        self.validation = InstructionValidation()

    @property
    def trunk(self) -> ImageEncoder:
        return self.model.vision

    def train(self, mode: bool = True) -> Instruction:
        super().train(mode)
        if mode:
            tuned = self.hparams["tune_language_model"], self.hparams["tune_vision"]
            set_part_modes(self.model, *tuned, recompute=self.hparams["grad_checkpointing"])
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.ckpt_path is None:
            self.start_from_init()

    def start_from_init(self) -> Transfer | None:
        init = self.hparams["init"]
        if init is None:
            return None
        content = read_checkpoint(init) if init.endswith(".ckpt") else {}
        if not is_instruction(content):
            transfer = load_dense(self.model.vision, init)
            logger.info("%s", transfer)
            return transfer
        _check_handover(init, content["hyper_parameters"], self.hparams)
        state = state_of(content)
        load_parts(self.model, state, init)
        transfer = Transfer(str(init), taken=sorted(state))
        logger.info("%s", transfer.summary)
        return transfer

    def on_train_start(self) -> None:
        self.train()  # Lightning leaves every part in the mode it was constructed in
        super().on_train_start()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        read = self._read(batch, self._unseen(batch["image"]))
        count = torch.tensor(float(len(read.targets)), device=self.device)
        # Every token of every rank weighs the same, as if one process had seen them all.
        mean_count = self.trainer.strategy.reduce(count, reduce_op="mean").clamp(min=1.0)
        loss = cross_entropy(read.logits, read.targets, reduction="sum") / mean_count
        if read.encoding is not None:
            loss = torch.stack([loss, *read.encoding.losses.values()]).sum()
            self.log_reduction(read.encoding)
        size = len(batch["ids"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/cut_tokens", read.cut.sum().float(), reduce_fx="sum", on_step=False, on_epoch=True)
        return {"loss": loss} | ({} if read.encoding is None else {"token_count": TokenCount.of(read.encoding)})

    def _read(self, batch: Batch, unseen: Tensor | None = None) -> Read:
        images = self.normalise(batch["image"])
        return self.model.read(batch, images, max_length=self.hparams["max_length"], unseen=unseen)

    def _unseen(self, images: Tensor) -> Tensor | None:
        """Zero, by way of encoder and projector, for the words of a batch without an image.

        Other ranks, which have images, wait for its gradients; and where parts are cut between the ranks, for each part
        in its turn, forward and backward, though the language model may be frozen. In one process only where nothing
        else learns from text alone.
        """
        if len(images) or (self.trainer.world_size == 1 and self.hparams["tune_language_model"] != "frozen"):
            return None
        blank = self.normalise(images.new_zeros(1, 3, *self.image_size))
        seen, _, encoding = self.model.see(blank)
        return 0 * torch.stack([seen.sum(), *encoding.losses.values()]).sum()

    def on_validation_epoch_start(self) -> None:
        self.validation.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation.update(self._read(batch), self.trunk)

    def on_validation_epoch_end(self) -> None:
        log_validation(self, self.validation.results(), shown=("exact", "loss"))

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end
    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self, part_groups(self.model, self.hparams))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` gives, which leaves out what did not learn of the language model."""
        if strict and (found := difference(state_dict, self.state_dict())):
            raise RuntimeError(f"the state does not fit the task: {found}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def _leave_out_what_stands_still(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Of the language model a checkpoint holds what learns: the rest is gigabytes that exist elsewhere."""
    start, tuned = f"{prefix}language_model.", module.hparams["tune_language_model"]
    for name in [name for name in state if name.startswith(start)]:
        if tuned == "frozen" or (tuned == "lora" and name.removeprefix(start) not in module.learned_words):
            del state[name]


def _check_handover(init: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what would be lost, or read otherwise, from one run to the next.

    Raises:
        UserError: Naming it.
    """
    tuned, wanted = (options.get("tune_language_model", "frozen") for options in (before, now))
    if tuned not in ("frozen", wanted):
        raise UserError(
            f"the language model in {init} was tuned ({tuned}), and this run's checkpoints would leave it out "
            f"({wanted}): `dtpvit export --checkpoint {init} --out DIR`, and give DIR/language_model as language_model"
        )
    for name in ("projector", "position", "select", "select_layer", "image_aspect"):
        if before.get(name) != now[name]:
            raise UserError(f"{name} is {now[name]} where {init} was trained with {before.get(name)}; give the same")


def _encoder(
    encoder: str | dict[str, Any] | None, init: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Any]:
    """Encoder and pixel statistics, of which a checkpoint of ours tells what was not given."""
    known: dict[str, Any] = {}
    if init is not None and init.endswith(".ckpt") and None in (encoder, mean, std):
        known = encoder_of(init)
    if encoder is None and "encoder" not in known:
        raise UserError("encoder is missing; name one, or give a checkpoint of dtpvit as init, which records its own")
    given = {"encoder": encoder, "mean": mean, "std": std}
    return {"mean": None, "std": None, **known} | {name: value for name, value in given.items() if value is not None}
