"""A folder that open_clip loads, or an ONNX file, from one of our checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from dtpvit.encoder import DualEncoder, VisualTower
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.errors import UserError
from dtpvit.interop.checkpoint_facts import checkpoint_facts
from dtpvit.interop.checkpoint_format import FORMAT, FORMAT_KEY
from dtpvit.interop.create import build_clip
from dtpvit.interop.instruction_models import is_instruction, load_instruction_model, save_instruction_model
from dtpvit.interop.loading import chosen_model, load_state
from dtpvit.interop.model_card import ASSISTANT_CARD, CLIP_CARD, write_card
from dtpvit.interop.model_config import model_config, to_open_clip
from dtpvit.interop.onnx_file import write_onnx
from dtpvit.interop.weight_files import read_checkpoint, state_of, write_safetensors
from dtpvit.output_file import write_json

__all__ = ["export"]


def export(
    checkpoint: str,
    out: str | None = None,
    model: str | None = None,
    onnx: str | None = None,
    budget: Literal["fixed"] | None = None,
) -> None:
    """Write a checkpoint as a folder that open_clip loads, or its image tower as an ONNX file, or both.

    A checkpoint of the instruction task is written as a folder that ``dtpvit.load_assistant`` loads, adapters merged. A
    folder has a model card, README.md, of what the checkpoint records, and LICENSE, that of the code.

    The folder loads under ``local-dir:FOLDER``, after ``import dtpvit``. The ONNX file takes normalised images, as many
    at a time as one likes, and gives the features before their normalisation; it is compared with PyTorch in
    onnxruntime.

    Args:
        checkpoint: A checkpoint of ``dtpvit fit``, or the weights alone together with ``model``.
        out: The folder to write; created if absent.
        model: Name of the model, where the checkpoint does not record it.
        onnx: The ONNX file to write. Its shapes are static, but for the batch: the budget must be fixed.
        budget: ``fixed`` lets the ONNX file of a model trained with a dynamic budget keep the same weights and give
            every image the same number of tokens, those of its top logits, where the model gives an image more or
            fewer: the mean stays the nominal one, the counts and hence the features change.

    Raises:
        UserError: If the checkpoint does not load, or an option does not fit.
    """
    if out is None and onnx is None:
        raise UserError("export was told nothing to write; give --out FOLDER, --onnx FILE.onnx, or both")
    if budget is not None and onnx is None:
        raise UserError("--budget changes the ONNX file only; give --onnx FILE.onnx with it")
    content = read_checkpoint(checkpoint)
    if is_instruction(content):
        if out is None or onnx is not None:
            raise UserError("a model that answers questions is written as a folder only; give --out FOLDER")
        found = load_instruction_model(checkpoint)
        save_instruction_model(found, out)
        write_card(Path(out), ASSISTANT_CARD, found.model.vision, 0, checkpoint_facts(content))
        print(f"wrote {out}: dtpvit.load_assistant({out!r})")
        return
    config = model_config(chosen_model(model, content, checkpoint))
    clip = build_clip(config)
    load_state(clip, state_of(content), checkpoint)
    if out is not None:
        _write_folder(clip, config, Path(out))
        trunk, embed_dim = clip.visual.trunk, int(config["embed_dim"])
        write_card(Path(out), CLIP_CARD, trunk, embed_dim, checkpoint_facts(content), Path(onnx) if onnx else None)
    if onnx is not None:
        _write_tower(clip.visual, Path(onnx), budget)


def _write_folder(clip: DualEncoder, config: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(clip.state_dict(), folder / "open_clip_model.safetensors")
    described = {"model_cfg": to_open_clip(config), "preprocess_cfg": _preprocess(clip.visual)}
    write_json(folder / "open_clip_config.json", {**described, FORMAT_KEY: FORMAT})
    print(f"wrote {folder}: open_clip.create_model_and_transforms('local-dir:{folder}') after import dtpvit")


def _write_tower(tower: VisualTower, path: Path, budget: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if budget == "fixed":
        for reducer in tower.trunk.reducers.values():
            if isinstance(reducer, DynamicPooling):
                reducer.fix_budget()
    difference = write_onnx(tower, path, notes={"preprocess_cfg": json.dumps(_preprocess(tower))})
    print(f"wrote {path}: images to features, within {difference:.0e} of PyTorch in onnxruntime")


def _preprocess(tower: VisualTower) -> dict[str, Any]:
    """What the images must look like, as open_clip writes it down."""
    return {
        "size": list(tower.image_size),
        "mode": "RGB",
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
