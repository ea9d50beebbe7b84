"""README.md and LICENSE of an exported folder: a model card as Hugging Face reads it."""

from __future__ import annotations

import copy
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import dtpvit
from dtpvit.encoder import ImageEncoder
from dtpvit.encoder.reducers import DynamicPooling, TokenReducer
from dtpvit.interop.checkpoint_facts import CheckpointFacts

__all__ = ["ASSISTANT_CARD", "CLIP_CARD", "CardKind", "write_card"]

MARK = "<!-- Written by dtpvit export, which writes it anew. Remove this line to keep what you write here. -->"


@dataclass(frozen=True)
class CardKind:
    """What differs between the kinds of folders.

    Attributes:
        library: Which loads it, by Hugging Face's name.
        pipeline: Hugging Face's name of what it does.
        tags: Beside ``dtpvit``.
        what: One sentence.
        code: Python that loads and runs it; FOLDER stands for the folder's name.
        use: What it is for, and what it is not.
    """

    library: str
    pipeline: str
    tags: tuple[str, ...]
    what: str
    code: str
    use: str


CLIP_CARD = CardKind(
    library="open_clip",
    pipeline="zero-shot-image-classification",
    tags=("clip", "token-pooling"),
    what="A dual encoder of images and texts (CLIP) whose image tower joins or drops tokens on the way.",
    code="""\
import dtpvit  # so that open_clip knows the image tower
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
texts = ["a photo of a cat", "a photo of a dog"]
with torch.inference_mode():
    images = preprocess(Image.open("photo.jpg")).unsqueeze(0)
    found, named, scale = model.eval()(images, open_clip.get_tokenizer("local-dir:FOLDER")(texts))[:3]
print(dict(zip(texts, (scale * found @ named.T).softmax(dim=-1)[0].tolist())))
""",
    use="""\
For research: comparing images with texts, and as an encoder in front of other models. What it knows of a subject was
not measured here beyond the figures above. It has whatever bias its training data have. Before any other use, and
before any that concerns people, measure it on data of that use. Texts are cut at the context length.""",
)

ASSISTANT_CARD = CardKind(
    library="dtpvit",
    pipeline="image-text-to-text",
    tags=("visual-question-answering", "token-pooling"),
    what="A language model behind an image encoder that hands it few tokens: answers questions about images.",
    code="""\
import dtpvit
from dtpvit.interop.assistant import Question
from PIL import Image

assistant = dtpvit.load_assistant("FOLDER")
(answer,) = assistant.answer([Question.of("What is in the picture?", Image.open("photo.jpg"))])
print(answer.text, answer.visual_tokens)
""",
    use="""\
For research on visual tokens. Its answers may be wrong and sound right; nobody should act on one unchecked. It has
whatever bias its training data and its language model have. Beyond the figures above nothing was measured here.""",
)

_ONNX = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("ONNX")
images = np.zeros((1, 3, {height}, {width}), np.float32)  # normalised as open_clip_config.json says
print(session.run(None, {{"images": images}})[0].shape)
"""


def write_card(
    folder: Path, kind: CardKind, trunk: ImageEncoder, embed_dim: int, facts: CheckpointFacts, onnx: Path | None = None
) -> None:
    """Write README.md and LICENSE, the licence of the code, into a folder.

    A README.md that somebody has made their own, by removing the line that says how, is left alone.

    Args:
        folder: Which holds the weights.
        kind: What is in it.
        trunk: The image encoder, for its cost.
        embed_dim: Outputs of the projection behind it, 0 for none.
        facts: What the checkpoint says.
        onnx: The ONNX file written in the same call.
    """
    (folder / "LICENSE").write_text(_licence(), encoding="utf-8")
    card = folder / "README.md"
    if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        print(f"left {card} as it is, for it is not of dtpvit export")
        return
    parts = [
        _front(kind, facts),
        MARK,
        f"# {folder.resolve().name}",
        kind.what,
        "## Use",
        _code(kind, folder),
    ]
    if onnx is not None:
        code = _ONNX.format(height=trunk.image_size[0], width=trunk.image_size[1]).replace(
            "ONNX", _relative(onnx, folder)
        )
        parts += ["The image tower alone, without torch:", f"```python\n{code}```"]
    parts += ["## Cost of an image", _cost(trunk, embed_dim), "## Training", _training(facts), "## Measured"]
    parts += [_measured(facts), "## Meant for, and limits", kind.use, "## Licence and origin", _origin(facts)]
    card.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front(kind: CardKind, facts: CheckpointFacts) -> str:
    """The entries between two lines of dashes, of which Hugging Face makes its filters."""
    # Of weights that began as somebody else's, or may have, the code's licence says nothing.
    is_ours = facts.model is not None and not facts.started_from
    licence = {"license": "apache-2.0"} if is_ours else {"license": "other", "license_name": "unknown-check"}
    entries = {**licence, "library_name": kind.library, "pipeline_tag": kind.pipeline, "tags": ["dtpvit", *kind.tags]}
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---"


def _code(kind: CardKind, folder: Path) -> str:
    install = f"```bash\npip install dtpvit  # this was written by version {dtpvit.__version__}\n```"
    return f"{install}\n\n```python\n{kind.code.replace('FOLDER', folder.name)}```"


def _relative(file: Path, folder: Path) -> str:
    inside = file.resolve().parent == folder.resolve()
    return f"{folder.name}/{file.name}" if inside else file.name


@torch.no_grad()
def _cost(trunk: ImageEncoder, embed_dim: int) -> str:
    """Of an image with the nominal number of tokens, where a budget is dynamic."""
    twin = copy.deepcopy(trunk).eval()
    reducers = [reducer for reducer in twin.reducers.values() if isinstance(reducer, TokenReducer)]
    for reducer in reducers:
        if isinstance(reducer, DynamicPooling):
            reducer.fix_budget()
    pixels = torch.randn(1, twin.in_channels, *twin.image_size, generator=torch.Generator().manual_seed(0))
    encoding = getattr(twin, "encode", twin)(pixels)
    projection = twin.dim * embed_dim
    own = (float(twin.cost(encoding.layouts).total) + projection) / 1e9
    dense = (twin.dense_macs() + projection) / 1e9
    patches = twin.grid_size[0] * twin.grid_size[1]
    tokens = encoding.tokens.layout.total - encoding.tokens.num_prefix
    rows = [f"| patch tokens behind the last reducer | {tokens} | {patches} |", f"| GMACs | {own:.3g} | {dense:.3g} |"]
    lines = ["| | this model | without reducers |", "|---|---:|---:|", *rows]
    height, width = twin.image_size
    note = f"At {height} x {width} pixels; GMACs are 1e9 multiply-accumulates of the image tower. "
    if any(not reducer.fixed for reducer in trunk.reducers.values() if isinstance(reducer, TokenReducer)):
        note += "The number of tokens differs from image to image; "
        note += "these are nominal." if all(reducer.fixed for reducer in reducers) else "these are of random pixels."
    return "\n".join([*lines, "", note.strip()])


def _training(facts: CheckpointFacts) -> str:
    known = {
        "training data": facts.data or "not recorded in the checkpoint",
        "samples a step and process": facts.batch_size,
        "whole epochs": facts.epochs,
        "optimizer steps": facts.steps,
        **facts.recipe,
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in known.items() if value is not None)]
    if facts.model is not None:
        model = facts.model if isinstance(facts.model, str) else yaml.safe_dump(facts.model, sort_keys=False).strip()
        lines += ["", "The model's config:", "", f"```yaml\n{model}\n```"]
    return "\n".join(lines)


def _measured(facts: CheckpointFacts) -> str:
    if not facts.metrics:
        return "The checkpoint holds no measurement."
    rows = [f"| {name} | {value:.4g} |" for name, value in facts.metrics.items()]
    return "\n".join(["At the last validation before these weights were saved:", "", "| | |", "|---|---:|", *rows])


def _origin(facts: CheckpointFacts) -> str:
    lines = ["LICENSE, Apache-2.0, is of the code that wrote this folder."]
    for what, name in facts.started_from.items():
        lines.append(f"The {what} started from `{name}`, whose origin and licence are not recorded: unknown, check.")
    if not facts.started_from:
        lines.append("The checkpoint names no weights that these started from.")
    return " ".join([*lines, "The licence of the training data is not recorded: unknown, check."])


def _licence() -> str:
    """Of the installed package, or of the repository that this runs from."""
    try:
        files = importlib.metadata.files("dtpvit") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file.locate() for file in files if file.name == "LICENSE"]
    found.append(Path(dtpvit.__file__).parents[1] / "LICENSE")
    return Path(str(found[0])).read_text(encoding="utf-8")
