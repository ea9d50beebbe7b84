"""A tiny visual language model and fixed conversations, for tests in one and in several processes."""

import lightning as L
import torch
from torch.utils.data import DataLoader

from dtpvit.interop.chat import Turn
from dtpvit.interop.tiny_language_model import make_tiny_language_model
from dtpvit.tasks.instruction import Instruction

TEXTS = ["what colour is it?", "is it red?", "yes", "no", "red", "blue", "green"]
POOLING = {"class_path": "DynamicPooling", "init_args": {"compression": 3}}
ENCODER = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "num_heads": 2, "reducers": {1: POOLING}}


def language_model(folder):
    return str(make_tiny_language_model(TEXTS, folder, dim=32, depth=2, num_heads=2, max_length=256))


def task(folder, **options):
    torch.manual_seed(0)
    options = {"encoder": ENCODER, "max_length": 128, "learning_rate": 1e-2} | options
    return Instruction(language_model=str(folder), **options)


def batch(chat, size=4, text_only=1):
    """Plain images of three colours, and what colour they are; the last conversations are without an image."""
    g = torch.Generator().manual_seed(1)
    names, turns, colours = ["red", "green", "blue"], [], []
    for row in range(size):
        seen = row < size - text_only
        question = (None, "\nwhat colour is it?") if seen else ("is it red?",)
        turns.append([Turn("user", question), Turn("assistant", (names[row % 3] if seen else "no",))])
        if seen:
            colours.append(row % 3)
    encoded = [chat.encode(each) for each in turns]
    longest = max(len(each.ids) for each in encoded)
    ids, supervised = torch.full((size, longest), chat.pad_id), torch.zeros(size, longest, dtype=torch.bool)
    for row, each in enumerate(encoded):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
        supervised[row, : len(each.ids)] = torch.tensor(each.supervised)
    images = torch.randint(0, 60, (len(colours), 3, 32, 32), dtype=torch.uint8, generator=g)
    for image, colour in zip(images, colours, strict=True):
        image[colour] += 190
    return {
        "image": images,
        "image_seed": torch.arange(len(images)) + 100,
        "ids": ids,
        "supervised": supervised,
        "length": torch.tensor([len(each.ids) for each in encoded]),
        "record": torch.arange(size),
    }


class Conversations(L.LightningDataModule):
    """The same batch in every step, cut between the ranks; the last rank gets the one without an image."""

    def __init__(self, steps=1, size=4, text_only=1):
        super().__init__()
        self.steps, self.size, self.text_only = steps, size, text_only

    def _mine(self):
        chat = self.trainer.lightning_module.chat
        if self.trainer.world_size == 1:
            return batch(chat, self.size, self.text_only)
        whole, images = batch(chat, self.size, self.text_only), self.size - self.text_only
        rows = [slice(0, images), slice(images, None)][self.trainer.global_rank]
        pictures = slice(None) if self.trainer.global_rank == 0 else slice(0, 0)
        return {name: value[pictures if name.startswith("image") else rows] for name, value in whole.items()}

    def train_dataloader(self):
        return DataLoader([self._mine()] * self.steps, batch_size=None)

    def val_dataloader(self):
        return DataLoader([self._mine()], batch_size=None)


def fit(module, data=None, resume=None, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    options = {"accelerator": "cpu", "enable_model_summary": False} | options
    trainer = L.Trainer(**options)
    trainer.fit(module, data or Conversations(), ckpt_path=resume)
    return trainer
