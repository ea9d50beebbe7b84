"""A folder that open_clip loads, from one of our checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file

from dtpvit.interop.create import build_clip
from dtpvit.interop.loading import chosen_model, load_state
from dtpvit.interop.model_config import model_config, to_open_clip
from dtpvit.interop.weight_files import read_checkpoint, state_of

__all__ = ["export"]


def export(checkpoint: str, out: str, model: str | None = None) -> None:
    """Write a folder that open_clip loads under ``local-dir:FOLDER``, after ``import dtpvit``.

    Args:
        checkpoint: A checkpoint of ``dtpvit fit``, or the weights alone together with ``model``.
        out: The folder to write; created if absent.
        model: Name of the model, where the checkpoint does not record it.
    """
    content = read_checkpoint(checkpoint)
    config = model_config(chosen_model(model, content, checkpoint))
    clip = build_clip(config)
    load_state(clip, state_of(content), checkpoint)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    size = list(clip.visual.trunk.image_size)
    preprocess = {
        "size": size,
        "mode": "RGB",
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    described = {"model_cfg": to_open_clip(config), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    print(f"wrote {folder}: open_clip.create_model_and_transforms('local-dir:{folder}') after import dtpvit")
