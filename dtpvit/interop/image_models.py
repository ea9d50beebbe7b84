"""Image classifiers by name, plain config or checkpoint, under timm's names, and how their pixels are normalised."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg, list_pretrained
from torch import nn

from dtpvit.errors import UserError
from dtpvit.interop.create import build_trunk
from dtpvit.interop.loading import is_classifier, load_state
from dtpvit.interop.model_config import trunk_config
from dtpvit.interop.timm_models import TimmEncoder, timm_class
from dtpvit.interop.weight_files import read_checkpoint, state_of

__all__ = [
    "ImageClassifier",
    "create_classifier",
    "image_model",
    "load_classifier",
    "pixel_statistics",
    "vision_config",
]


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier and what its inputs must look like.

    Attributes:
        model: Normalised images, shape (B, 3, H, W), to logits, shape (B, num_classes); the size is its ``image_size``.
        name: timm's name or one of ours, or ``custom`` for a config.
        mean: Channel means of the normalisation, on [0, 1].
        std: Channel standard deviations, likewise.
    """

    model: TimmEncoder
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def vision_config(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """The vision config behind a name, or behind a config that may start from a name.

    Args:
        model: timm's name of a dense model (``deit_tiny_patch16_224``), one of ours
            (``dtp_vit_base_patch32_clip_224_10x``), or arguments of :class:`dtpvit.encoder.VisionEncoder`, of which
            ``preset`` or ``name`` may give all that the others do not; or ``encoder``, of another class.

    Raises:
        UserError: If it is neither, or a name begins like one of ours and is none.
    """
    if isinstance(model, str):
        return trunk_config(model) if model.startswith("dtp_") else {"preset": model}
    if not isinstance(model, Mapping):
        raise UserError(f"the model is {model!r}; expected a name like vit_tiny_patch16_224, or a vision config")
    given = dict(model)
    name = given.pop("name", None)
    return given if name is None else {**vision_config(str(name)), **given}


def image_model(model: str | Mapping[str, Any], num_classes: int) -> TimmEncoder:
    """A classifier whose state dict has timm's names.

    The new classifier starts as timm's does: weights of standard deviation 0.02, biases at 0.

    Args:
        model: See :func:`vision_config`.
        num_classes: At least 2, or 0 for an encoder without a classifier.

    Raises:
        UserError: If the model does not build or there are too few classes.
    """
    if not isinstance(num_classes, int) or num_classes == 1 or num_classes < 0:
        raise UserError(f"num_classes is {num_classes!r}; expected at least 2")
    built = build_trunk(vision_config(model), timm_class, num_classes=num_classes)
    if not num_classes:
        return built
    assert isinstance(built.head, nn.Linear)
    nn.init.trunc_normal_(built.head.weight, std=0.02)
    nn.init.zeros_(built.head.bias)
    return built


def pixel_statistics(vision: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations on [0, 1] that weights of this preset were trained with.

    timm's for a model that timm has, or has at 224 pixels; else CLIP's for trunks of CLIP and ImageNet's otherwise.

    >>> pixel_statistics({"preset": "vit_tiny_patch16_224"})
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    foreign = (vision.get("encoder") or {}).get("init_args") or {}
    library, _, preset = str(vision.get("preset") or foreign.get("name", "")).rpartition(":")
    tag = foreign.get("pretrained")
    if library == "open_clip":
        known = open_clip.get_pretrained_cfg(preset, tag) if tag else {}
        return tuple(known.get("mean") or OPENAI_DATASET_MEAN), tuple(known.get("std") or OPENAI_DATASET_STD)
    if tag and f"{preset}.{tag}" in list_pretrained(f"{preset}.*"):
        preset = f"{preset}.{tag}"
    for name in (preset, re.sub(r"\d+$", "224", preset)):
        known = get_pretrained_cfg(name) if name else None
        if known is not None:
            return tuple(known.mean), tuple(known.std)
    if "_clip_" in preset:
        return tuple(OPENAI_DATASET_MEAN), tuple(OPENAI_DATASET_STD)
    return tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)


def create_classifier(
    model: str | Mapping[str, Any],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageClassifier:
    """A classifier with random weights.

    Args:
        model: See :func:`vision_config`.
        num_classes: At least 2.
        mean: Channel means on [0, 1]; None takes those of the model's preset.
        std: Channel standard deviations, likewise.

    Raises:
        UserError: If the model does not build or there are too few classes.
    """
    built = image_model(model, num_classes)
    usual_mean, usual_std = pixel_statistics(vision_config(model))
    name = model if isinstance(model, str) else "custom"
    return ImageClassifier(built, name, tuple(mean or usual_mean), tuple(std or usual_std))


def load_classifier(checkpoint: str | Path) -> ImageClassifier:
    """The classifier in a checkpoint of the classification task, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: If the file cannot be read, is of another task, or does not hold the weights that it promises.
    """
    content = read_checkpoint(checkpoint)
    if not is_classifier(content):
        raise UserError(f"checkpoint {checkpoint} records no classifier; expected one of the classification task")
    options = content["hyper_parameters"]
    found = create_classifier(options.get("model"), *(options.get(name) for name in ("num_classes", "mean", "std")))
    load_state(found.model, state_of(content), checkpoint)
    found.model.eval()
    return found
