"""Dual encoders ready to be evaluated: ours from a checkpoint, any of open_clip's by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from dtpvit.encoder import ImageEncoder
from dtpvit.errors import UserError
from dtpvit.interop.checkpoint_format import FORMAT_KEY, check_format
from dtpvit.interop.create import build_clip
from dtpvit.interop.foreign_classes import check_classes
from dtpvit.interop.model_config import NAMES, PATTERN, from_open_clip, model_config
from dtpvit.interop.weight_files import read_checkpoint, state_of
from dtpvit.json_input import parse_json

__all__ = ["LoadedClip", "Tokenize", "chosen_model", "difference", "is_classifier", "load_clip", "load_state"]


class Tokenize:
    """open_clip's CLIP tokenizer for captions of a given context length; picklable.

    Args:
        context_length: Tokens a caption is cut or padded to.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._tokenizer: Callable[..., Tensor] | None = None

    def __call__(self, captions: list[str]) -> Tensor:
        """Token ids, int64, shape (n, context_length)."""
        if self._tokenizer is None:
            from open_clip import SimpleTokenizer

            self._tokenizer = SimpleTokenizer(context_length=self.context_length)
        return self._tokenizer(captions)

    def __getstate__(self) -> dict[str, Any]:
        return {"context_length": self.context_length, "_tokenizer": None}


@dataclass
class LoadedClip:
    """A dual encoder and what its inputs must look like.

    Attributes:
        model: With ``encode_image``, ``encode_text`` and ``logit_scale``, in evaluation mode, float32, on the CPU.
        name: Its name, or ``custom`` for a config that has none.
        image_size: Height and width in pixels.
        mean: Channel means of the normalisation, on [0, 1].
        std: Channel standard deviations, likewise.
        tokenize: Captions to token ids.
        resize_mode: How images are brought to size: ``shortest``, ``longest`` or ``squash``.
    """

    model: nn.Module
    name: str
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenize: Callable[[list[str]], Tensor]
    resize_mode: str = "shortest"


def is_classifier(content: Mapping[str, Any]) -> bool:
    """Whether the content of a checkpoint is that of the classification task: it alone records a number of classes."""
    return "num_classes" in (content.get("hyper_parameters") or {})


def chosen_model(model: str | Mapping[str, Any] | None, content: dict[str, Any] | None, source: object) -> Any:
    """The name that was given, else the name or config that a checkpoint of ours records.

    Args:
        model: The name or config, or None.
        content: Of the checkpoint, or None where there is none.
        source: The checkpoint, for the message.

    Raises:
        UserError: If neither says it, or the checkpoint is one of a classifier.
    """
    if is_classifier(content or {}):
        raise UserError(
            f"checkpoint {source} is of a classifier; expected one of a dual encoder, the contrastive task's"
        )
    spec = model if model is not None else (content or {}).get("hyper_parameters", {}).get("model")
    if spec is None:
        raise UserError(f"checkpoint {source} does not record which model it is; give --model NAME")
    return spec


def difference(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> str:
    """In which names and shapes ``state`` differs from a model's ``mine``, with the first of each; empty if in none."""
    missing, extra = sorted(set(mine) - set(state)), sorted(set(state) - set(mine))
    shapes = [n for n in mine if n in state and mine[n].shape != state[n].shape]
    found = [f"{len(missing)} tensors are missing (first: {missing[0]})"] if missing else []
    found += [f"{len(extra)} are unknown (first: {extra[0]})"] if extra else []
    if shapes:
        pair = f"{tuple(state[shapes[0]].shape)}, here {tuple(mine[shapes[0]].shape)}"
        found.append(f"{len(shapes)} have another shape (first: {shapes[0]} {pair})")
    return ", ".join(found)


def load_state(model: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Load strictly.

    Raises:
        UserError: If a name or a shape differs, with the first of them.
    """
    if found := difference(state, model.state_dict()):
        raise UserError(f"{source} is of another architecture: {found}; name the model it was made with")
    model.load_state_dict(state)


def load_clip(model: str | Mapping[str, Any] | None = None, checkpoint: str | Path | None = None) -> LoadedClip:
    """Load a dual encoder.

    Args:
        model: One of our names or configs, ``local-dir:FOLDER`` as ``dtpvit export`` writes it, or a name of
            open_clip's; may be left out where the checkpoint is one of ours, which records it.
        checkpoint: Weights; for open_clip's own models also a pretrained tag. None keeps random weights, good for
            measuring cost.

    Raises:
        UserError: If neither says which model it is, or the weights do not fit.
    """
    content = read_checkpoint(checkpoint) if checkpoint is not None and _is_file(checkpoint) else None
    spec = chosen_model(model, content, checkpoint)
    if isinstance(spec, str) and spec not in NAMES:
        return _from_open_clip(spec, checkpoint)
    config = model_config(spec)
    clip = build_clip(config)
    if content is not None:
        load_state(clip, state_of(content), checkpoint)
    elif checkpoint is not None:
        raise UserError(f"checkpoint {checkpoint} does not exist; expected a file")
    height, width = clip.visual.trunk.image_size
    name = spec if isinstance(spec, str) else str(spec.get("name", "custom"))
    tokenize = Tokenize(clip.context_length)
    return LoadedClip(clip.eval(), name, (height, width), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, tokenize)


def _is_file(checkpoint: str | Path) -> bool:
    path = Path(checkpoint)
    return path.exists() or path.suffix != ""


def _from_open_clip(name: str, checkpoint: str | Path | None) -> LoadedClip:
    import open_clip

    known = name.startswith(("local-dir:", "hf-hub:")) or name in open_clip.list_models()
    if not known:
        raise UserError(f"no model is called {name!r}; expected {PATTERN}, local-dir:FOLDER, or a name of open_clip's")
    pretrained = None if checkpoint is None else str(checkpoint)
    if name.startswith("local-dir:"):
        _check_folder(Path(name.removeprefix("local-dir:")))
    try:
        model = open_clip.create_model(name, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, FileNotFoundError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"open_clip cannot load {name} with {checkpoint}: {str(error).splitlines()[0]}") from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    clip = _with_packed_towers(name, model)
    return LoadedClip(
        clip.eval(), name, (height, width), preprocess["mean"], preprocess["std"], tokenizer, preprocess["resize_mode"]
    )


def _check_folder(folder: Path) -> None:
    """Refuse an exported folder that is damaged, or of a newer format.

    Raises:
        UserError: Naming the file.
    """
    config = folder / "open_clip_config.json"
    try:
        described = parse_json(config.read_bytes()) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"{config} is damaged ({error}); export the checkpoint anew") from error
    if not isinstance(described, dict):
        raise UserError(f"{config} holds a {type(described).__name__}, no mapping; export the checkpoint anew")
    check_format(described.get(FORMAT_KEY), config)
    check_classes(described, config)
    for weights in folder.glob("*.safetensors"):
        read_checkpoint(weights)


def _with_packed_towers(name: str, model: nn.Module) -> nn.Module:
    """The same weights in our dual encoder where a folder holds one of our trunks, else the model itself."""
    config = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
    if not isinstance(getattr(model.visual, "trunk", None), ImageEncoder) or not config.is_file():
        return model
    clip = build_clip(from_open_clip(json.loads(config.read_text())["model_cfg"]))
    clip.load_state_dict(model.state_dict())
    return clip
