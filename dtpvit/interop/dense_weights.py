"""Dense timm and open_clip weights into an encoder of the same width, with an account of every tensor."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dtpvit.encoder import DualEncoder, ImageEncoder
from dtpvit.encoder.layers import QuickGELU, resize_position_embedding
from dtpvit.errors import UserError
from dtpvit.interop.weight_files import read_checkpoint, state_of

__all__ = ["Transfer", "load_dense", "to_our_names"]

# open_clip's native Vision Transformer -> timm's names, which are ours
_BLOCK_NAMES = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VISUAL_NAMES = {
    "conv1.weight": "patch_embed.proj.weight",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}


@dataclass
class Transfer:
    """What became of each tensor.

    Attributes:
        source: Where the weights came from.
        taken: Names of the model's tensors that were set.
        left: Tensors of the source that were not used, and why.
        fresh: Names of the model's tensors that keep their initial values, and why.
        notes: What no tensor shows.
    """

    source: str
    taken: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line, notes included."""
        return "; ".join([f"initialised from {self.source}: {len(self.taken)} tensors taken", *self.notes])

    def __str__(self) -> str:
        groups = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in self.taken)
        lines = [f"initialised from {self.source}: {len(self.taken)} tensors taken"]
        lines += [f"  taken: {name}" + (f" ({count})" if count > 1 else "") for name, count in groups.items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  not taken: {name} ({why})" for name, why in self.left.items()]
        lines += [f"  kept fresh: {name} ({why})" for name, why in self.fresh.items()]
        return "\n".join(lines)


def to_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a timm, open_clip or own state to the names of a dual encoder (``visual.trunk.*``, text at the top)."""
    if any(name.startswith("visual.trunk.") for name in state):
        return dict(state)
    if "visual.conv1.weight" in state:
        return {_from_open_clip(name): _reshape(name, value) for name, value in state.items()}
    return {f"visual.trunk.{name}": value for name, value in state.items()}


def _from_open_clip(name: str) -> str:
    if not name.startswith("visual."):
        return name
    inner = name.removeprefix("visual.")
    if inner == "proj":
        return "visual.head.proj.weight"
    match = re.match(r"transformer\.resblocks\.(\d+)\.(.+)$", inner)
    if not match:
        return f"visual.trunk.{_VISUAL_NAMES.get(inner, inner)}"
    rest = match[2]
    for theirs, ours in _BLOCK_NAMES.items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            rest = ours + rest.removeprefix(theirs)
    return f"visual.trunk.blocks.{match[1]}.{rest}"


def _reshape(name: str, value: Tensor) -> Tensor:
    if name == "visual.proj":
        return value.T
    if name == "visual.class_embedding":
        return value.view(1, 1, -1)
    return value[None] if name == "visual.positional_embedding" else value


def _read(source: str | Path) -> dict[str, Tensor]:
    """Weights of a file, of a timm model name, or of open_clip's ``MODEL:TAG``."""
    path = Path(source)
    if path.exists() or path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensors"):
        return state_of(read_checkpoint(path))
    name, _, tag = str(source).partition(":")
    try:
        if tag:
            import open_clip

            return open_clip.create_model(name, pretrained=tag).state_dict()
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        expected = "a file, a timm model name, or open_clip's MODEL:TAG"
        raise UserError(f"no weights were found under {source} ({reason}); expected {expected}") from error


@torch.no_grad()
def load_dense(model: ImageEncoder | DualEncoder, source: str | Path) -> Transfer:
    """Set the tensors of ``model`` for which ``source`` has a match; the position embedding is resampled.

    Args:
        model: What to initialise, of the width of the source.
        source: A file (timm's, open_clip's, or our own checkpoint), a timm model name, or open_clip's ``MODEL:TAG``;
            the last two where the network allows.

    Raises:
        UserError: If the source cannot be read, has another width, or shares no tensor with the model.
    """
    prefix = "visual.trunk." if isinstance(model, ImageEncoder) else ""
    trunk = model if isinstance(model, ImageEncoder) else model.visual.trunk
    state = to_our_names(_read(source))
    transfer = Transfer(str(source))
    mine = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    for name, value in state.items():
        if name not in mine:
            transfer.left[name] = "this model has no such tensor"
            continue
        if name == "visual.trunk.pos_embed":
            value = _fit_positions(value, trunk, mine[name])
        if value.shape != mine[name].shape:
            found, wanted = tuple(value.shape), tuple(mine[name].shape)
            if name == "visual.trunk.norm.weight":
                raise UserError(f"{source} has width {found[0]}, the model has width {wanted[0]}; choose one that fits")
            transfer.left[name] = f"shape {found}, here {wanted}"
            continue
        mine[name].copy_(value)
        transfer.taken.append(name)
    if not transfer.taken:
        raise UserError(f"{source} shares no tensor with this model; it holds {sorted(state)[:4]}")
    quick = any(hint in str(source).lower() for hint in ("quickgelu", "openai"))
    if quick and not any(isinstance(module, QuickGELU) for module in trunk.modules()):
        transfer.notes.append("the source was trained with QuickGELU, this model has GELU; give vision act: quick_gelu")
    for name in sorted(set(mine) - set(transfer.taken)):
        why = "no dense model has it" if "reducers." in name else "the source has none that fits"
        transfer.fresh[name] = why
    return transfer


def _fit_positions(embedding: Tensor, trunk: ImageEncoder, wanted: Tensor) -> Tensor:
    if embedding.shape[-1] != trunk.dim or embedding.shape == wanted.shape:
        return embedding
    side = round((embedding.shape[1] - 1) ** 0.5)
    if side * side != embedding.shape[1] - 1:
        return embedding
    return resize_position_embedding(embedding, (side, side), trunk.grid_size, num_prefix=1)
