"""The encoders that a command shows: of checkpoints, and of a pretrained model with reducers put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dtpvit.errors import UserError
from dtpvit.evaluation.compared_rows import read_rows
from dtpvit.evaluation.towers import Tower, load_tower, pretrained_tower
from dtpvit.interop.pretrained import load_pretrained

__all__ = ["shown_towers"]


def shown_towers(
    checkpoints: Sequence[str], model: str | None, init: str | None, fragments: Sequence[str]
) -> list[Tower]:
    """Towers of ours under short names.

    Args:
        checkpoints: Whatever :func:`.load_tower` takes.
        model: timm's or open_clip's name of the model that ``fragments`` are put in.
        init: Its weights; None is what timm or open_clip download.
        fragments: YAML files of reducers.

    Raises:
        UserError: If there is nothing to show, or something that is no encoder of ours.
    """
    if not checkpoints and not fragments:
        raise UserError("nothing says how tokens are reduced; give --checkpoint FILE, or --model NAME --reducers FILE")
    if bool(fragments) != (model is not None):
        raise UserError("--model and --reducers go together: the first names the encoder, the second what is put in it")
    found = list[Tower]()
    for spec in dict.fromkeys(checkpoints):
        tower = load_tower(spec)
        if tower.trunk is None:
            raise UserError(f"{spec} is no encoder of dtpvit's; give its name with --model, and --reducers to put in")
        found.append(replace(tower, name=_short(spec)))
    for row in read_rows(fragments)[1:] if model is not None else []:  # the first is the dense model
        torch.manual_seed(0)
        tower = pretrained_tower(row.name, load_pretrained(str(model), init, row.reducers))
        assert tower.trunk is not None
        found.append(tower)
        learned = {name for name, _ in tower.trunk.reducers.named_parameters()}
        if any(not name.endswith("boundary_sensitivity") for name in learned):
            print(f"dtpvit: {row.name} has parts that training would change; it is shown as it starts")
    return found


def _short(spec: str) -> str:
    """The run of a checkpoint of ours, else the name of the file."""
    path = Path(spec)
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}, {path.stem}"
    return path.stem if path.suffix in (".ckpt", ".pt", ".pth", ".safetensors", ".yaml", ".yml") else spec
