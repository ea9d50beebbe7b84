"""Building encoders: the only place where names and numbers meet classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dtpvit.encoder import DualEncoder, VisionEncoder, VisualTower, preset
from dtpvit.errors import UserError
from dtpvit.interop.dense_weights import load_dense
from dtpvit.interop.model_config import model_config, trunk_config
from dtpvit.interop.reducer_config import reducer_makers

__all__ = ["build_clip", "build_trunk", "create_clip", "create_encoder"]

logger = logging.getLogger(__name__)
Trunk = TypeVar("Trunk", bound=VisionEncoder)


def build_trunk(vision: Mapping[str, Any], cls: type[Trunk] = VisionEncoder, **overrides: Any) -> Trunk:
    """An encoder from a plain vision config (see :mod:`dtpvit.interop.model_config`).

    Raises:
        UserError: If an entry is unknown or does not fit.
    """
    arguments = {**vision, **overrides}
    name = arguments.pop("preset", None)
    try:
        arguments = {**(preset(name) if name else {}), **arguments}
        arguments["reducers"] = reducer_makers(arguments.get("reducers"))
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"the vision config does not build: {error}") from error


def build_clip(config: Mapping[str, Any]) -> DualEncoder:
    """A dual encoder from a full config.

    Raises:
        UserError: If an entry is unknown or does not fit.
    """
    trunk = build_trunk(config["vision"])
    scale = config.get("init_logit_scale")
    try:
        return DualEncoder(
            VisualTower(trunk, config["embed_dim"]),
            config["embed_dim"],
            text=config["text"],
            init_logit_scale=math.log(1 / 0.07) if scale is None else scale,
            init_logit_bias=config.get("init_logit_bias"),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"the text config does not build: {error}") from error


def create_encoder(
    name: str, *, reducers: Mapping[Any, Any] | None = None, init: str | Path | None = None, **overrides: Any
) -> VisionEncoder:
    """A vision encoder by its published name.

    Args:
        name: timm's name of the dense model, such as ``vit_tiny_patch16_224`` or ``vit_base_patch32_clip_224``, or
            one of ours, such as ``dtp_vit_base_patch32_clip_224_10x``.
        reducers: For each block with a reducer, or several at once as ``"0-11"``: a reducer, what makes one from the
            width, or ``{"class_path": "DynamicPooling", "init_args": {"compression": 4}}`` (see
            :func:`dtpvit.interop.reducer_config.reducer_makers`).
        init: Dense weights to start from: a file, or a timm or open_clip tag (see
            :func:`dtpvit.interop.dense_weights.load_dense`).
        **overrides: Any argument of :class:`dtpvit.encoder.VisionEncoder`.

    Raises:
        UserError: If a name, an argument or the weights do not fit.

    >>> encoder = create_encoder("vit_tiny_patch16_224", reducers={2: {"class_path": "FixedStride",
    ...     "init_args": {"compression": 4}}})
    >>> encoder.depth
    12
    """
    vision = trunk_config(name) if name.startswith("dtp_") else {"preset": name}
    if reducers is not None:
        overrides["reducers"] = reducers
    encoder = build_trunk(vision, **overrides)
    if init is not None:
        logger.warning("%s", load_dense(encoder, init))
    return encoder


def create_clip(model: str | Mapping[str, Any], *, init: str | Path | None = None) -> DualEncoder:
    """A dual encoder, both towers packed, under the parameter names of the open_clip model of that name.

    Args:
        model: A name such as ``DTP-ViT-B-32-10x``, or a config (see :mod:`dtpvit.interop.model_config`).
        init: Dense weights to start from: a file, or an open_clip or timm tag.

    Raises:
        UserError: If the name, an entry or the weights do not fit.
    """
    clip = build_clip(model_config(model))
    if init is not None:
        logger.warning("%s", load_dense(clip, init))
    return clip
