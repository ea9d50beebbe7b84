"""Names and plain configs of dual encoders, and their form in open_clip's model configs.

A config is a plain mapping::

    embed_dim: 512
    vision: {preset: vit_base_patch32_clip_224, reducers: {2: {class_path: DynamicPooling, init_args: {...}}}}
    text: {context_length: 77, vocab_size: 49408, width: 512, heads: 8, layers: 12}
    init_logit_scale, init_logit_bias: optional

``vision: {encoder: {class_path: NeighbourhoodEncoder, init_args: {...}}}`` is an encoder of another class, and
``name: DTP-ViT-B-32-10x`` starts from a published name, whose entries the others then replace.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from dtpvit.encoder.presets import preset
from dtpvit.errors import UserError

__all__ = [
    "NAMES",
    "PATTERN",
    "from_open_clip",
    "model_config",
    "replaced",
    "to_open_clip",
    "trunk_config",
    "trunk_name",
    "with_vision",
]

_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
_NAME = re.compile(r"DTP-ViT-B-(?P<patch>16|32)-(?P<rate>1|2|4|10)x(?P<late>-4p8)?(?P<siglip>-siglip)?$")
_TRUNK = re.compile(r"dtp_(?P<preset>vit_\w+?_patch\d+(?:_clip)?_\d+)_(?P<rate>\d+)x(?P<late>_4p8)?$")
_KEYS = {"embed_dim", "vision", "text", "init_logit_scale", "init_logit_bias"}

PATTERN = "DTP-ViT-B-(32|16)-(1|2|4|10)x[-4p8][-siglip]"

NAMES: tuple[str, ...] = tuple(
    f"DTP-ViT-B-{patch}-{rate}x{late}{siglip}"
    for patch in (32, 16)
    for rate in (1, 2, 4, 10)
    for late in ("", "-4p8")
    for siglip in ("", "-siglip")
    if not (rate == 1 and late)
)


def trunk_config(trunk: str) -> dict[str, Any]:
    """Vision config behind a timm name of ours: ``dtp_vit_base_patch32_clip_224_10x`` or ``dtp_vit.{quoted json}``.

    Raises:
        UserError: If the name is not one of ours.
    """
    if trunk.startswith("dtp_vit."):
        try:
            return json.loads(unquote(trunk.removeprefix("dtp_vit.")))
        except ValueError as error:
            raise UserError(f"the trunk {trunk!r} does not hold a vision config ({error})") from error
    match = _TRUNK.match(trunk)
    if not match:
        raise UserError(f"no trunk is called {trunk!r}; expected a name like dtp_vit_base_patch32_clip_224_10x")
    rate, before = int(match["rate"]), 4 if match["late"] else 2
    reducer = {"class_path": "DynamicPooling", "init_args": {"compression": rate}}
    return {"preset": match["preset"], "reducers": {} if rate == 1 else {before: reducer}}


def trunk_name(vision: Mapping[str, Any]) -> str:
    """timm model name from which :func:`trunk_config` gives ``vision`` again; closed dataclasses upstream leave no
    other place where a model's own arguments could travel."""
    plain = json.loads(json.dumps(vision))
    name = vision.get("preset")
    for reducer in (vision.get("reducers") or {1: None}).values():
        rate = 1 if reducer is None else reducer.get("init_args", {}).get("compression", 1)
        for late in ("", "_4p8"):
            short = f"dtp_{name}_{rate}x{late}"
            if _TRUNK.match(short) and json.loads(json.dumps(trunk_config(short))) == plain:
                return short
    # Quoted, since timm takes a name with a colon or a slash for an address.
    return "dtp_vit." + quote(json.dumps(plain, separators=(",", ":"), sort_keys=True), safe='{}[]",')


def _published(name: str) -> dict[str, Any]:
    match = _NAME.match(name)
    if not match:
        raise UserError(f"no model is called {name!r}; expected {PATTERN}")
    late = "_4p8" if match["late"] else ""
    trunk = f"dtp_vit_base_patch{match['patch']}_clip_224_{match['rate']}x{late}"
    config: dict[str, Any] = {"embed_dim": 512, "vision": trunk_config(trunk), "text": dict(_TEXT)}
    if match["siglip"]:
        config |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    return config


def model_config(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """The full config behind a name, or behind a config that may start from a name.

    Raises:
        UserError: If the name or an entry is unknown, or a needed entry is missing.
    """
    if isinstance(model, str):
        return _published(model)
    if not isinstance(model, Mapping):
        raise UserError(f"the model is {model!r}; expected a name like {NAMES[0]}, or a config")
    given = copy.deepcopy(dict(model))
    config = _published(given.pop("name")) if "name" in given else {}
    unknown = set(given) - _KEYS
    if unknown:
        raise UserError(f"the model config has the unknown entries {sorted(unknown)}; expected {sorted(_KEYS)}")
    for key, value in given.items():
        started = {} if isinstance(value, Mapping) and "encoder" in value else config.get(key, {})
        config[key] = {**started, **value} if isinstance(value, Mapping) else value
    missing = {"embed_dim", "vision", "text"} - set(config)
    if missing:
        raise UserError(f"the model config lacks {sorted(missing)}; give them, or start from name: {NAMES[0]}")
    return config


def replaced(vision: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """A vision config with other entries than it has.

    Args:
        vision: The config.
        entries: Instead of its own. An ``encoder``, with class_path and init_args, replaces the config as a whole.

    >>> replaced({"preset": "vit_tiny_patch16_224", "reducers": {}}, {"reducers": {3: {"class_path": "ToMe"}}})
    {'preset': 'vit_tiny_patch16_224', 'reducers': {3: {'class_path': 'ToMe'}}}
    """
    return {**({} if "encoder" in entries else vision), **entries}


def with_vision(model: str | Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`model_config` of a dual encoder with other entries in its vision config, as of :func:`replaced`."""
    config = model_config(model)
    return {**config, "vision": replaced(config["vision"], entries)}


def to_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's ``model_cfg`` for a config, which ``open_clip.create_model`` builds once dtpvit is imported."""
    vision = config["vision"]
    given = vision["encoder"].get("init_args", {}) if "encoder" in vision else vision
    size = given.get("image_size") or (preset(vision["preset"])["image_size"] if "preset" in vision else 224)
    model = {
        "embed_dim": config["embed_dim"],
        "vision_cfg": {
            "timm_model_name": trunk_name(vision),
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": size,
        },
        "text_cfg": {k: v for k, v in config["text"].items() if k != "act"},
    }
    if config["text"].get("act") == "quick_gelu":
        model["quick_gelu"] = True
    model |= {k: config[k] for k in ("init_logit_scale", "init_logit_bias") if config.get(k) is not None}
    return model


def from_open_clip(model: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`to_open_clip`.

    Raises:
        UserError: If the model has another trunk than ours.
    """
    vision, text = model["vision_cfg"], dict(model["text_cfg"])
    trunk = vision.get("timm_model_name", "")
    if not trunk.startswith("dtp_"):
        raise UserError(f"the model's trunk is {trunk or 'open_clip’s own'!r}; expected one of dtpvit's")
    if model.get("quick_gelu"):
        text["act"] = "quick_gelu"
    config = {"embed_dim": model["embed_dim"], "vision": trunk_config(trunk), "text": text}
    return config | {k: model[k] for k in ("init_logit_scale", "init_logit_bias") if model.get(k) is not None}
