"""Which parts of a visual language model learn, how fast, and in which mode each stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

from dtpvit.encoder import VisionEncoder
from dtpvit.errors import UserError
from dtpvit.interop.visual_language import VisualLanguageModel
from dtpvit.tasks.learning_modes import train_reducers
from dtpvit.tasks.optimization import decay_groups, layer_groups

__all__ = ["TuneLanguage", "TuneVision", "freeze_parts", "part_groups", "set_part_modes"]

TuneLanguage = Literal["frozen", "full", "lora"]
TuneVision = Literal["frozen", "reducers", "partial", "full"]


def freeze_parts(
    model: VisualLanguageModel, projector: bool, language: TuneLanguage, vision: TuneVision, vision_from: int
) -> None:
    """Let only those parameters require a gradient that learn.

    What comes behind the tokens that the language model reads, such as the encoder's last block where the last but one
    is selected, never does.

    Args:
        model: With adapters already, where ``language`` is ``lora``.
        projector: Whether it learns.
        language: Of the language model.
        vision: Of the encoder.
        vision_from: First block that learns, of ``partial``.

    Raises:
        UserError: If an option is none of these, or nothing would learn.
    """
    for name, given, known in (
        ("tune_language_model", language, get_args(TuneLanguage)),
        ("tune_vision", vision, get_args(TuneVision)),
    ):
        if given not in known:
            raise UserError(f"{name} is {given!r}; expected one of {', '.join(known)}")
    model.projector.requires_grad_(projector)
    if language != "lora":  # else the adapters alone learn, as they were made
        model.language_model.requires_grad_(language == "full")
    model.vision.requires_grad_(False)
    for part in _learning_of_encoder(model.vision, vision, vision_from):
        part.requires_grad_(True)
    for part in _unread(model):
        part.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("nothing would learn; tune the projector, the language model or the encoder")


def _learning_of_encoder(encoder: nn.Module, vision: TuneVision, vision_from: int) -> list[nn.Module]:
    if vision == "frozen":
        return []
    if vision == "full":
        return [encoder]
    if vision == "reducers":
        reducers: Any = encoder.reducers
        if not any(True for _ in reducers.parameters()):
            raise UserError("tune_vision is reducers, and this encoder's have nothing to learn; use another value")
        return [reducers]
    if not isinstance(encoder, VisionEncoder) or not 0 <= vision_from < encoder.depth:
        raise UserError(f"tune_vision_from is {vision_from}; expected a block of a Vision Transformer")
    late = [reducer for block, reducer in encoder.reducers.items() if int(block) >= vision_from]
    return [*encoder.blocks[vision_from:], encoder.norm, *late]


def _unread(model: VisualLanguageModel) -> list[nn.Module]:
    """Parts of the encoder that come behind what the language model reads."""
    if model.depth is None:
        return []
    encoder = model.vision
    assert isinstance(encoder, VisionEncoder)
    late = [reducer for block, reducer in encoder.reducers.items() if int(block) >= model.depth]
    return [*encoder.blocks[model.depth :], encoder.norm, *late]


def set_part_modes(
    model: VisualLanguageModel, language: TuneLanguage, vision: TuneVision, *, recompute: bool = False
) -> None:
    """Training mode for what learns; evaluation mode, without dropout, for what stands still.

    A frozen language model that is to ``recompute`` its layers is in training mode too, or it would keep them.
    """
    model.language_model.train(language != "frozen" or recompute)
    model.vision.train(vision in ("partial", "full"))
    if vision == "reducers":
        train_reducers(model.vision)


def part_groups(model: VisualLanguageModel, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of encoder, projector and language model, each with its own learning rate.

    Args:
        model: Its parameters that require no gradient are left out.
        options: ``learning_rate``, ``projector_lr``, ``vision_lr``, ``layer_decay``, ``predictor_lr_scale`` and
            ``weight_decay`` of the task.
    """
    rate, decay = options["learning_rate"], options["weight_decay"]
    groups: list[dict[str, Any]] = []
    for part, own in ((model.projector, options["projector_lr"]), (model.language_model, None)):
        lr = rate if own is None else own
        groups += [group | {"lr": lr} for group in decay_groups(part.named_parameters(), decay) if group["params"]]
    if any(parameter.requires_grad for parameter in model.vision.parameters()):
        groups += layer_groups(
            model.vision,
            learning_rate=rate if options["vision_lr"] is None else options["vision_lr"],
            weight_decay=decay,
            layer_decay=options["layer_decay"],
            predictor_lr_scale=options["predictor_lr_scale"],
        )
    return groups
