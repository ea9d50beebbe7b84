"""Small real runs, one of each task that trains an encoder, with all in them that could forget something."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

__all__ = ["KINDS", "STEPS", "logged", "write_config", "write_images"]

STEPS = 21
"""Optimizer steps of each run: three epochs of seven."""

_NAMES = ("red", "green", "blue")
_POOLING = {"class_path": "DynamicPooling", "init_args": {"compression": 4, "estimator": "symmetric"}}
_VISION = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "reducers": {1: _POOLING}}
_TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
_MIXING = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}

KINDS: dict[str, dict[str, Any]] = {
    "contrastive": {
        "class_path": "dtpvit.tasks.contrastive.Contrastive",
        "init_args": {"model": {"embed_dim": 16, "vision": _VISION, "text": _TEXT}, "warmup_steps": 5},
    },
    "classification": {
        "class_path": "dtpvit.tasks.classification.Classification",
        "init_args": {
            "model": {**_VISION, "drop_path": 0.3},
            "num_classes": len(_NAMES),
            "mixing": _MIXING,
            "label_smoothing": 0.1,
            "layer_decay": 0.8,
            "compression_warmup": 9,
            "warmup_steps": 5,
        },
    },
}


def write_images(folder: Path, shards: int = 3, images: int = 10) -> Path:
    """Shards of noisy images of three colours, with captions and labels; one in eleven is cut off and unreadable."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * images, (shard + 1) * images):
                label = number % len(_NAMES)
                pixels = torch.randint(0, 90, (36, 40, 3), dtype=torch.uint8, generator=generator)
                pixels[..., label] += 120
                stream = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(stream, "JPEG")
                image = stream.getvalue()[: 300 if number % 11 == 5 else None]
                parts = {"jpg": image, "txt": f"{_NAMES[label]} {number}".encode(), "cls": str(label).encode()}
                for ending, content in parts.items():
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": images}))
    (folder / "classnames.txt").write_text("\n".join(_NAMES))
    return folder


def write_config(
    kind: str, images: Path, file: Path, *, num_workers: int, diary: dict[str, Any], every: int = 2
) -> list[str]:
    """Write the config of a run and return the arguments of ``dtpvit`` that start it or go on with it.

    Args:
        kind: Of ``KINDS``.
        images: What :func:`write_images` wrote.
        file: The config; the run's folder is the file's name without its ending.
        num_workers: Of the loaders.
        diary: Arguments of :class:`benchmarks.killed_runs.Diary`.
        every: Optimizer steps between checkpoints.
    """
    callbacks: list[dict[str, Any]] = [{"class_path": "benchmarks.killed_runs.Diary", "init_args": diary}]
    data = {"train": str(images), "val": str(images), "batch_size": 4, "num_workers": num_workers}
    module = "image_text.ImageTextShards"
    if kind == "classification":
        module = "labelled_images.LabelledImages"
        callbacks.append({"class_path": "dtpvit.tasks.weight_average.WeightAverage", "init_args": {"decay": 0.8}})
    trainer = {"max_epochs": 3, "accelerator": "cpu", "gradient_clip_val": 1.0, "log_every_n_steps": 1}
    content = {
        "seed_everything": 0,
        "trainer": {**trainer, "callbacks": callbacks, "default_root_dir": str(file.with_suffix(""))},
        "checkpoint": {"every_n_train_steps": every},
        "model": KINDS[kind],
        "data": {"class_path": f"dtpvit.datamodules.{module}", "init_args": data},
    }
    file.write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(file), "--ckpt_path", "last"]


def logged(file: Path) -> dict[tuple[int, str], str]:
    """What ``metrics.csv`` says of each step, of one done twice what was said last.

    Times measured are left out, and the counts of skipped samples: of an epoch they begin anew with each start.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    skipped = ("efficiency/", "data/skipped/", "step", "epoch")
    found = [(int(row["step"]), name, value) for row in rows for name, value in row.items() if value]
    return {(step, name): value for step, name, value in found if not name.startswith(skipped)}
