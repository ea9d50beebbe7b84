"""A tiny dual encoder and a fixed batch of pairs, for tests in one and in several processes."""

from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from dtpvit.tasks.contrastive import Contrastive

CAPTIONS = ["a red ball", "two dogs on grass", "a cat", "the old town at night, seen from a hill", "snow", "a boat"]


def config(reducers=None, estimator="regression", **more):
    reducer = {"class_path": "DynamicPooling", "init_args": {"compression": 4, "estimator": estimator}}
    vision = {"image_size": 32, "patch_size": 4, "dim": 32, "depth": 3, "num_heads": 2}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision["reducers"] = {1: reducer} if reducers is None else reducers
    return {"embed_dim": 16, "vision": vision, "text": text, **more}


def task(**options):
    torch.manual_seed(0)
    options = {"model": config(), "warmup_steps": 1, "learning_rate": 0.01, "optimizer": "sgd"} | options
    return Contrastive(**options)


def batch(size=12):
    g = torch.Generator().manual_seed(1)
    tokenize = task().tokenize
    return {
        "image": torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=g),
        "text": tokenize([f"{CAPTIONS[i % len(CAPTIONS)]} {i}" for i in range(size)]),
        "seed": torch.arange(size) + 100,
        "key": [f"pairs/{number}" for number in range(size)],
    }


class Pairs(L.LightningDataModule):
    """The same batch in every step, cut into equal parts for the ranks."""

    def __init__(self, steps=1):
        super().__init__()
        self.steps = steps

    def train_dataloader(self):
        whole, world, rank = batch(), self.trainer.world_size, self.trainer.global_rank
        keys = whole.pop("key")
        mine = {name: value.chunk(world)[rank] for name, value in whole.items()}
        mine["key"] = keys[rank * len(keys) // world :][: len(keys) // world]
        return DataLoader([mine] * self.steps, batch_size=None)


class Record(L.Callback):
    """Writes what each rank saw: boundaries, loss and gradients of every step."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.sources = []

    def on_train_start(self, trainer, pl_module):
        reducer = pl_module.model.visual.trunk.reducers["1"]
        reducer.register_forward_hook(lambda module, inputs, output: self.sources.append(output.tokens.source))

    def on_train_batch_start(self, *unused):
        self.sources.clear()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        threshold = pl_module.model.visual.trunk.reducers["1"].boundary_calibration.boundary_threshold
        found = {"grads": grads, "sources": list(self.sources), "threshold": threshold.clone()}
        found["loss"] = trainer.callback_metrics["train/loss"].clone()
        torch.save(found, self.folder / f"rank{trainer.global_rank}-step{trainer.global_step}.pt")


def fit(module, folder, **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    defaults |= {"enable_model_summary": False, "accelerator": "cpu", "callbacks": [Record(folder)]}
    trainer = L.Trainer(**(defaults | options))
    trainer.fit(module, Pairs(trainer.max_steps))
    return trainer
