"""Image classifiers by name or plain config, under timm's parameter names, and how their pixels are normalised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch import nn

from dtpvit.errors import UserError
from dtpvit.interop.create import build_trunk
from dtpvit.interop.model_config import trunk_config
from dtpvit.interop.timm_models import TimmVisionEncoder

__all__ = ["image_model", "pixel_statistics", "vision_config"]


def vision_config(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """The vision config behind a name, or behind a config that may start from a name.

    Args:
        model: timm's name of a dense model (``deit_tiny_patch16_224``), one of ours
            (``dtp_vit_base_patch32_clip_224_10x``), or arguments of :class:`dtpvit.encoder.VisionEncoder`, of which
            ``preset`` or ``name`` may give all that the others do not.

    Raises:
        UserError: If a name begins like one of ours and is none.
    """
    if isinstance(model, str):
        return trunk_config(model) if model.startswith("dtp_") else {"preset": model}
    given = dict(model)
    name = given.pop("name", None)
    return given if name is None else {**vision_config(str(name)), **given}


def image_model(model: str | Mapping[str, Any], num_classes: int) -> TimmVisionEncoder:
    """A classifier whose state dict has timm's names.

    The new classifier starts as timm's does: weights of standard deviation 0.02, biases at 0.

    Args:
        model: See :func:`vision_config`.
        num_classes: At least 2.

    Raises:
        UserError: If the model does not build or there are too few classes.
    """
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}; expected at least 2")
    built = build_trunk(vision_config(model), TimmVisionEncoder, num_classes=num_classes)
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
    preset = str(vision.get("preset", ""))
    for name in (preset, re.sub(r"\d+$", "224", preset)):
        known = get_pretrained_cfg(name) if name else None
        if known is not None:
            return tuple(known.mean), tuple(known.std)
    if "_clip_" in preset:
        return tuple(OPENAI_DATASET_MEAN), tuple(OPENAI_DATASET_STD)
    return tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
