"""Building encoders: the only place where names and numbers meet classes."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dtpvit import encoder as built_in
from dtpvit.encoder import DualEncoder, ImageEncoder, VisionEncoder, VisualTower, preset
from dtpvit.errors import UserError
from dtpvit.interop.dense_weights import load_dense
from dtpvit.interop.model_config import model_config, trunk_config
from dtpvit.interop.reducer_config import reducer_makers

__all__ = ["build_clip", "build_trunk", "create_clip", "create_encoder"]

logger = logging.getLogger(__name__)
Trunk = TypeVar("Trunk", bound=ImageEncoder)


def _as_it_is(cls: type[ImageEncoder]) -> type[ImageEncoder]:
    return cls


def build_trunk(
    vision: Mapping[str, Any], kind: Callable[[type[ImageEncoder]], type[Trunk]] = _as_it_is, **overrides: Any
) -> Trunk:
    """An encoder from a plain vision config (see :mod:`dtpvit.interop.model_config`).

    Args:
        vision: Arguments of :class:`dtpvit.encoder.VisionEncoder`, of which ``preset`` may give all that the others do
            not; or ``encoder: {class_path: ..., init_args: {...}}`` alone, of any other encoder, where a class path
            without a dot names a class of :mod:`dtpvit.encoder`.
        kind: What is built in place of the class.
        **overrides: Further arguments of that.

    Raises:
        UserError: If an entry is unknown or does not fit.
    """
    given = dict(vision)
    if "encoder" in given:
        cls, arguments = _named_encoder(given)
    else:
        cls, arguments = VisionEncoder, given
    arguments |= overrides
    name = arguments.pop("preset", None)
    try:
        arguments = {**(preset(name) if name else {}), **arguments}
        if issubclass(cls, VisionEncoder):
            arguments["reducers"] = reducer_makers(arguments.get("reducers"))
        return kind(cls)(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the vision config does not build: {error}") from error


def _named_encoder(vision: dict[str, Any]) -> tuple[type[ImageEncoder], dict[str, Any]]:
    """Class and arguments behind the entry ``encoder``."""
    entry = vision.pop("encoder")
    if vision:
        raise UserError(f"the vision config has encoder beside {sorted(vision)}; put arguments under its init_args")
    if not isinstance(entry, Mapping) or "class_path" not in entry or set(entry) - {"class_path", "init_args"}:
        raise UserError(f"an encoder is given as {entry!r}; expected class_path and, where needed, init_args")
    module_name, _, name = str(entry["class_path"]).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name) if module_name else built_in, name, None)
    except ImportError as error:
        raise UserError(f"encoder {entry['class_path']!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, ImageEncoder)):
        known = [n for n in built_in.__all__ if n.endswith("Encoder") and n not in ("DualEncoder", "ImageEncoder")]
        raise UserError(f"{entry['class_path']!r} is no image encoder; dtpvit has {', '.join(known)}")
    return found, dict(entry.get("init_args") or {})


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
    except (TypeError, ValueError, RuntimeError) as error:
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
    assert isinstance(encoder, VisionEncoder)
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
