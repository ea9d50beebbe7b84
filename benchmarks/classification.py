"""What boundaries are worth: one classifier fine-tuned in many ways, each with the same schedule and several seeds.

python -m benchmarks.classification --recipe configs/cifar10.yaml --init FILE --output docs/results/classification.md

Every row is a run of `dtpvit fit`, whose command it prints; a row that is there already is not run again.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from torch.nn.functional import cross_entropy

from benchmarks.classification_rows import ROWS, Row
from benchmarks.classification_table import compared
from benchmarks.record import heading, pages
from dtpvit.datamodules.labelled_images import LabelledImages
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.cost import image_macs
from dtpvit.tasks.classification import Classification


def classification(
    recipe: str,
    init: str,
    rows: list[str] | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (never changed)
    against: list[str] = ["base", "imitation"],  # noqa: B006
    options: str = "",
    jobs: int = 1,
    runs: str = "runs/evidence",
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Train the rows that are missing, then compare all of them image by image.

    Args:
        recipe: Config of `dtpvit fit`.
        init: Its pretrained weights.
        rows: Which rows, all if None; see benchmarks/classification_rows.py.
        seeds: Of each row: weights of the head, order, augmentation, noise.
        against: The rows that the others are compared with, one table each; those that are not run are left out.
        options: More options of `dtpvit fit`, for all rows, as one string.
        jobs: Runs at a time, which share the cores.
        runs: Folder of the runs.
        device: auto, cpu, cuda: where the evaluation runs.
        output: Markdown file to write.
    """
    if unknown := set(rows or []) - set(ROWS):
        raise SystemExit(f"there are no rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    place, folder = chosen_device(device), Path(runs) / Path(recipe).stem
    wanted = {name: row for name, row in ROWS.items() if rows is None or name in rows}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(_run, recipe, init, row, seed, options, jobs, folder / f"{name}-{seed}", place)
            for seed in seeds
            for name, row in wanted.items()
        ]
        for made in waiting:
            made.result()
    found = {name: [_read(folder / f"{name}-{seed}") for seed in seeds] for name in wanted}
    bases = [base for base in against if base in found] or list(found)[:1]
    tables = [f"## Against `{base}`\n\n{compared(found, wanted, base)}" for base in bases]
    name = f"{bases[0]}-{seeds[0]}"
    command = shlex.join(_command(recipe, init, ROWS[bases[0]], seeds[0], options, folder / name))
    shown = f"Row `{bases[0]}`, first seed, is the run below; in the others the reducers or an option differ.\n\n"
    title = heading(f"What boundaries are worth: {Path(recipe).stem}", place)
    pages([title, *tables, shown + f"```\n{command}\n```\n"], output)


def _command(recipe: str, init: str, row: Row, seed: int, options: str, folder: Path) -> list[str]:
    model = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["model"]["init_args"]["model"]
    model = {**model, "reducers": row.reducers}
    command = ["dtpvit", "fit", "--config", recipe, "--init", init, "--name", os.path.relpath(folder, "runs")]
    command += ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
    command += ["--trainer.limit_val_batches", "0", "--model.init_args.model", json.dumps(model)]
    return [*command, *row.options, *shlex.split(options)]


def _run(
    recipe: str, init: str, row: Row, seed: int, options: str, jobs: int, folder: Path, device: torch.device
) -> None:
    """Train and evaluate one row with one seed, unless that very command was run before."""
    command = _command(recipe, init, row, seed, options, folder)
    kept = folder / "images.json"
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")).get("command") == command:
        return
    threads = str(torch.get_num_threads())
    print(shlex.join(command), flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    minutes = (time.perf_counter() - start) / 60
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    images = _evaluate(recipe, folder / "checkpoints" / "last.ckpt", device)
    kept.write_text(json.dumps({"command": command, "minutes": minutes, **images}), encoding="utf-8")


@torch.no_grad()
def _evaluate(recipe: str, checkpoint: Path, device: torch.device) -> dict[str, list[float]]:
    """Of each validation image: cross-entropy, whether it is right, tokens and GMACs."""
    task: Any = Classification.load_from_checkpoint(checkpoint, map_location=device, weights_only=True).eval()
    options = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["data"]["init_args"]
    data = LabelledImages(**{**options, "train": None, "image_size": task.image_size, "num_classes": task.num_classes})
    data.setup("validate")
    found: dict[str, list[float]] = {"loss": [], "right": [], "tokens": [], "gmacs": []}
    for batch in data.val_dataloader():
        encoding = task.model.encode(task.normalise(batch["image"].to(device)))
        logits, labels = task.model.head(encoding.pooled).float(), batch["label"].to(device)
        found["loss"] += cross_entropy(logits, labels, reduction="none").tolist()
        found["right"] += (logits.argmax(1) == labels).float().tolist()
        found["tokens"] += encoding.tokens.lengths.tolist()
        found["gmacs"] += (image_macs(task.model, encoding) / 1e9).tolist()
    return found


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "images.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    auto_cli(classification, as_positional=False)
