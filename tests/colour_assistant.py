"""A tiny assistant that was taught three colours, to about ten seconds of one core."""

from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from dtpvit.interop.assistant import Assistant, Question
from dtpvit.interop.chat import Turn
from dtpvit.interop.instruction_models import create_instruction_model, save_instruction_model
from dtpvit.interop.tiny_language_model import make_tiny_language_model

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
NAME, IS_RED = "what colour is it?", "is it red?"
MAX_LENGTH = 256
_POOLING = {"class_path": "DynamicPooling", "init_args": {"compression": 4}}
_ENCODER = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "num_heads": 2, "reducers": {1: _POOLING}}


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (32, 32), COLOURS[colour])


def lessons() -> list[tuple[Question, str]]:
    """Everything it knows. Without an image it says no."""
    taught = [(Question.of(NAME), "no"), (Question.of(IS_RED), "no")]
    for colour in COLOURS:
        taught.append((Question.of(NAME, plain(colour)), colour))
        taught.append((Question.of(IS_RED, plain(colour)), "yes" if colour == "red" else "no"))
    return taught


def make_colour_assistant(folder: Path) -> None:
    """Train it and write it as an exported folder."""
    torch.manual_seed(0)
    words = make_tiny_language_model(
        [NAME, IS_RED, "yes", "no", *COLOURS], folder / "words", dim=32, depth=2, num_heads=2, max_length=MAX_LENGTH
    )
    found = create_instruction_model(_ENCODER, str(words), max_length=MAX_LENGTH)
    assistant, taught = Assistant(found), lessons()
    encoded = [found.chat.encode([*question.turns, Turn("assistant", (said,))]) for question, said in taught]
    longest = max(len(each.ids) for each in encoded)
    batch = {
        "ids": torch.tensor([each.ids + [found.chat.pad_id] * (longest - len(each.ids)) for each in encoded]),
        "supervised": torch.tensor([each.supervised + [False] * (longest - len(each.ids)) for each in encoded]),
        "length": torch.tensor([len(each.ids) for each in encoded]),
    }
    images = assistant._pixels([image for question, _ in taught for image in question.images])
    optimizer = torch.optim.AdamW(found.model.train().parameters(), lr=3e-3)
    for _ in range(150):
        read = found.model.read(batch, images, max_length=MAX_LENGTH)
        optimizer.zero_grad()
        cross_entropy(read.logits, read.targets).backward()
        optimizer.step()
    save_instruction_model(found, folder)
