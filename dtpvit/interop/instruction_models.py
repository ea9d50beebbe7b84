"""Visual language models by plain config, checkpoint or folder, with what goes in and comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from dtpvit.errors import UserError
from dtpvit.interop.chat import Chat, Template
from dtpvit.interop.checkpoint_format import FORMAT, FORMAT_KEY, check_format
from dtpvit.interop.foreign_classes import check_classes
from dtpvit.interop.image_models import ImageClassifier, create_classifier, image_model, pixel_statistics, vision_config
from dtpvit.interop.language_model import added_adapters, load_language_model, merged
from dtpvit.interop.loading import difference, load_state
from dtpvit.interop.model_config import model_config
from dtpvit.interop.visual_language import Select, VisualLanguageModel
from dtpvit.interop.weight_files import read_checkpoint, state_of, write_safetensors
from dtpvit.json_input import parse_json
from dtpvit.output_file import write_json

__all__ = [
    "InstructionModel",
    "create_instruction_model",
    "encoder_of",
    "is_instruction",
    "load_encoder",
    "load_instruction_model",
    "load_parts",
    "save_instruction_model",
]

_CONFIG = "dtpvit_config.json"
_OWN = "encoder_and_projector.safetensors"
_LANGUAGE = "language_model"
_ENTRIES = (
    *("encoder", "language_model", "template", "mean", "std", "image_aspect", "max_length"),
    *("projector", "position", "select", "select_layer"),
)


@dataclass(frozen=True)
class InstructionModel:
    """A model and what its inputs must look like.

    Attributes:
        model: Encoder, projector and language model.
        chat: Turns to token ids and back.
        config: Plain values that it builds from.
    """

    model: VisualLanguageModel
    chat: Chat
    config: dict[str, Any]

    @property
    def image_fill(self) -> tuple[int, ...]:
        """The mean colour, uint8, which pads an image to a square."""
        return tuple(round(255 * value) for value in self.config["mean"])


def create_instruction_model(
    encoder: str | Mapping[str, Any],
    language_model: str,
    *,
    template: Template = "chatml",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_aspect: str = "pad",
    max_length: int = 2048,
    language_dtype: str = "float32",
    projector: str = "mlp2x_gelu",
    position: bool = False,
    select: Select = "pooled",
    select_layer: int = -1,
) -> InstructionModel:
    """A language model as it is in its folder, behind an encoder and a projector with random weights.

    Args:
        encoder: See :func:`dtpvit.interop.image_models.vision_config`.
        language_model: A folder as transformers writes it, or a name on the hub.
        template: See :class:`dtpvit.interop.chat.Chat`.
        mean: Channel means on [0, 1]; None takes those of the encoder's preset.
        std: Channel standard deviations, likewise.
        image_aspect: How images are made square: ``pad``, ``crop`` or ``squash``.
        max_length: Most tokens of a conversation, images included.
        language_dtype: Of the language model's weights.
        projector, position, select, select_layer: See :class:`.VisualLanguageModel`.

    Raises:
        UserError: If a part is not there, or an argument does not fit.
    """
    vision = vision_config(encoder)
    usual = pixel_statistics(vision)
    words, tokenizer = load_language_model(language_model, language_dtype)
    limit = getattr(words.config.get_text_config(), "max_position_embeddings", None)  # pyright: ignore
    if limit is not None and max_length > limit:
        raise UserError(f"max_length is {max_length} where {language_model} knows {limit} positions; lower it")
    arguments: dict[str, Any] = {"projector": projector, "position": position}
    arguments |= {"select": select, "select_layer": select_layer}
    model = VisualLanguageModel(image_model(vision, 0), words, **arguments)
    config = {"encoder": _without_source(vision), "language_model": language_model, "template": template}
    config |= {"mean": list(mean or usual[0]), "std": list(std or usual[1])}
    config |= {"image_aspect": image_aspect, "max_length": max_length, **arguments}
    return InstructionModel(model, Chat(tokenizer, template), config)


def _without_source(vision: dict[str, Any]) -> dict[str, Any]:
    """The vision config without where a foreign tower's first weights came from: a checkpoint has its own."""
    entry = vision.get("encoder")
    if not isinstance(entry, Mapping) or "pretrained" not in (entry.get("init_args") or {}):
        return vision
    arguments = {name: value for name, value in entry["init_args"].items() if name != "pretrained"}
    return {**vision, "encoder": {**entry, "init_args": arguments}}


def is_instruction(content: Mapping[str, Any]) -> bool:
    """Whether the content of a checkpoint is that of the instruction task: it alone records a language model."""
    return "language_model" in (content.get("hyper_parameters") or {})


def encoder_of(checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint of ours, of any task, says about its image encoder: ``encoder``, ``mean`` and ``std``.

    Raises:
        UserError: If the file cannot be read, or records no encoder.
    """
    content = read_checkpoint(checkpoint, mmap=True)
    options = content.get("hyper_parameters") or {}
    if is_instruction(content):
        return {name: options.get(name) for name in ("encoder", "mean", "std")}
    model = options.get("model")
    if model is None:
        raise UserError(f"checkpoint {checkpoint} does not record which encoder it is of; name it as encoder")
    if "num_classes" in options:
        vision = vision_config(model)
        usual = pixel_statistics(vision)
        return {"encoder": vision, "mean": options.get("mean") or usual[0], "std": options.get("std") or usual[1]}
    clip = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    return {"encoder": dict(model_config(model)["vision"]), **clip}


def load_encoder(checkpoint: str | Path) -> ImageClassifier:
    """The image encoder alone of a checkpoint of the instruction task, without classes, in evaluation mode, on the CPU.

    Raises:
        UserError: If the file cannot be read, or does not hold the weights that it promises.
    """
    content = read_checkpoint(checkpoint)
    options = content["hyper_parameters"]
    found = create_classifier(options["encoder"], 0, options.get("mean"), options.get("std"))
    state = state_of(content)
    own = {name.removeprefix("vision."): value for name, value in state.items() if name.startswith("vision.")}
    load_state(found.model, own, checkpoint)
    found.model.eval()
    return found


def load_instruction_model(path: str | Path) -> InstructionModel:
    """A trained model in evaluation mode, adapters merged, on the CPU.

    Args:
        path: A checkpoint of the instruction task, or a folder that :func:`save_instruction_model` wrote.

    Raises:
        UserError: If it is neither, or its language model is not where it was.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _from_folder(path)
    content = read_checkpoint(path)
    if not is_instruction(content):
        raise UserError(f"checkpoint {path} records no language model; expected one of the instruction task")
    options = content["hyper_parameters"]
    found = create_instruction_model(**{name: options[name] for name in _ENTRIES})
    if options.get("tune_language_model") == "lora":
        found.model.language_model = added_adapters(found.model.language_model, options.get("lora"))
    state = state_of(content)
    load_parts(found.model, state, path)
    found.model.language_model = merged(found.model.language_model)
    found.model.eval().requires_grad_(False)
    return found


def load_parts(model: VisualLanguageModel, state: dict[str, Tensor], source: object) -> None:
    """Load encoder, projector and as much of the language model as the state has: all, adapters, or nothing.

    Raises:
        UserError: If anything else is missing or too much.
    """
    mine = model.state_dict()
    known = {name: mine[name] for name in mine if not name.startswith("language_model.") or name in state}
    if found := difference(state, known):
        raise UserError(f"{source} is of another architecture: {found}; name the parts it was made with")
    model.load_state_dict(state, strict=False)


def save_instruction_model(model: InstructionModel, folder: str | Path) -> None:
    """Write a folder that holds everything: encoder and projector, language model with adapters merged, tokenizer.

    Args:
        model: What to write; its adapters are merged into its weights.
        folder: Created if absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words: Any = merged(model.model.language_model)
    words.save_pretrained(folder / _LANGUAGE)
    model.chat.tokenizer.save_pretrained(folder / _LANGUAGE)
    own = {name: value for name, value in model.model.state_dict().items() if not name.startswith("language_model.")}
    write_safetensors(own, folder / _OWN)
    write_json(folder / _CONFIG, {**model.config, "language_model": _LANGUAGE, FORMAT_KEY: FORMAT})


def _from_folder(folder: Path) -> InstructionModel:
    file = folder / _CONFIG
    if not file.is_file():
        raise UserError(f"{folder} holds no {_CONFIG}; expected a folder that `dtpvit export` wrote of this task")
    try:
        config = parse_json(file.read_bytes())
        given = {name: config[name] for name in _ENTRIES}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); export the checkpoint anew") from error
    check_format(config.get(FORMAT_KEY), file)
    check_classes(config, file)
    given["language_model"] = str(folder / _LANGUAGE)
    found = create_instruction_model(**given)
    load_parts(found.model, state_of(read_checkpoint(folder / _OWN)), folder)
    found.model.eval().requires_grad_(False)
    return found
