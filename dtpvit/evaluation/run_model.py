"""What model a run trains, from its config alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.presets import preset
from dtpvit.errors import UserError
from dtpvit.evaluation.run_record import RunRecord
from dtpvit.evaluation.towers import load_tower
from dtpvit.interop.foreign_classes import check_classes
from dtpvit.interop.image_models import vision_config
from dtpvit.interop.model_config import replaced, with_vision

__all__ = ["TASKS", "RunModel", "nominal_gmacs", "run_model", "run_task"]

TASKS = ("Classification", "Contrastive", "Instruction")
_DEFAULTS = {name: entry.default for name, entry in inspect.signature(VisionEncoder).parameters.items()}


@dataclass(frozen=True)
class RunModel:
    """In words, with nothing where the config does not say.

    Attributes:
        name: The encoder, what reduces its tokens, and the language model behind it.
        resolution: Pixels.
        patch: Pixels.
    """

    name: str = ""
    resolution: str = ""
    patch: str = ""


def run_task(run: RunRecord) -> str:
    """One of ``TASKS`` or, of a class of the user's own that trains something else, its name; empty if unknown."""
    own = str(run.at("model", "class_path") or "").rpartition(".")[2]
    options = _options(run)
    for task, entry, metrics in (
        ("Instruction", "language_model", ("val/exact", "train/cut_tokens")),
        ("Classification", "num_classes", ("val/acc1",)),
        ("Contrastive", "accum_freq", ("train/contrastive_loss", "val/zeroshot_acc1")),
    ):
        if own == task or entry in options or any(metric in run.curves for metric in metrics):
            return task
    return own


def run_model(run: RunRecord) -> RunModel:
    """The model of a run."""
    options = _options(run)
    words = str(options.get("language_model") or "").rstrip("/").rpartition("/")[2]
    try:
        vision = _vision(options, run.encoder)
        name = ", ".join(filter(None, [_trunk(vision, options), _reducers(vision), words]))
        return RunModel(name, _pixels(_entry(vision, "image_size")), _pixels(_entry(vision, "patch_size")))
    except (UserError, ValueError, TypeError, AttributeError):  # a model of another kind, or an edited config
        return RunModel(", ".join(filter(None, [str(options.get("init") or ""), words])))


def nominal_gmacs(run: RunRecord) -> float | None:
    """GMACs of an image in the encoder of the config, untrained and thus at its nominal rate, on random pixels.

    None where the config alone does not make an encoder.
    """
    torch.manual_seed(0)
    try:
        config = run.folder / "config.yaml"
        check_classes(run.config, config)
        tower = load_tower(str(config))
        with torch.inference_mode():
            tower.image.eval()
            encoding = tower.encode(tower.pixels(None, 2)[0])[1]
        return None if encoding is None else tower.macs(encoding.layouts) / 1e9
    except Exception:  # whatever a config of another version or project may raise: the cell stays empty
        return None


def _options(run: RunRecord) -> dict[str, Any]:
    found = run.at("model", "init_args")
    return found if isinstance(found, dict) else {}  # an edited config


def _vision(options: Mapping[str, Any], encoder: Any) -> dict[str, Any]:
    """Arguments of the encoder, or ``encoder`` with class and arguments."""
    entries = options.get("vision") or {}
    if "language_model" in options:
        return vision_config(encoder) if encoder else replaced(vision_config(options.get("encoder") or {}), entries)
    model = options.get("model") or {}
    if "num_classes" in options:
        return replaced(vision_config(model), entries)
    return with_vision(model, entries)["vision"]


def _entry(vision: Mapping[str, Any], name: str) -> Any:
    given = (vision.get("encoder") or {}).get("init_args") or vision
    if "preset" in vision:
        return given.get(name) or preset(vision["preset"])[name]
    return given.get(name) or (_DEFAULTS.get(name) if given is vision and vision else None)


def _pixels(size: Any) -> str:
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return " x ".join(map(str, size)) if isinstance(size, list | tuple) else str(size or "")


def _trunk(vision: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    if "preset" in vision:
        return str(vision["preset"])
    if "encoder" in vision:
        return _class(vision["encoder"])
    if not vision:  # an instruction run whose encoder comes from a checkpoint
        init = Path(str(options.get("init") or ""))
        return init.parent.parent.name if init.parent.name == "checkpoints" else init.name
    return f"ViT of {_entry(vision, 'depth')} blocks, width {_entry(vision, 'dim')}"


def _reducers(vision: Mapping[str, Any]) -> str:
    if "encoder" in vision or not vision:
        return ""
    found = list[str]()
    for block, reducer in (vision.get("reducers") or {}).items():
        compression = (reducer.get("init_args") or {}).get("compression") if isinstance(reducer, Mapping) else None
        rate = f" {compression:g}x" if isinstance(compression, int | float) else ""
        found.append(f"{_class(reducer)}{rate} at block {block}")
    return " + ".join(found) or "dense"


def _class(spec: Any) -> str:
    return str(spec["class_path"] if isinstance(spec, Mapping) else spec).rpartition(".")[2]
