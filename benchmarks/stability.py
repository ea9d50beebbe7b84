"""The quickstart in three precisions, and with learning rates that are too high: what it comes to, and what is said.

python -m benchmarks.stability --output docs/results/stability.md

Every row is a run of `dtpvit fit` and two of `dtpvit zeroshot`; a row that is there already is not run again.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lightning.pytorch.plugins import MixedPrecision

from benchmarks.record import heading, pages, table

CONFIG = "configs/quickstart.yaml"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class HalfOnCPU(MixedPrecision):
    """fp16 with a gradient scaler on a CPU, where Lightning turns ``16-mixed`` into ``bf16-mixed``."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # pyright: ignore


def stability(
    epochs: int = 3,
    seeds: list[int] = [0, 1],  # noqa: B006 (never changed)
    factors: list[float] = [3, 10, 30, 100],  # noqa: B006
    runs: str = "runs/stability",
    images: str = "data/shapes/generated",
    output: str | None = None,
) -> None:
    """Train the rows that are missing, one at a time with one thread, and tell what became of each.

    Args:
        epochs: Of each run; the schedule ends with them.
        seeds: Of each precision: weights, order and noise; of fp16 on a CPU, which emulates it, the first alone.
        factors: On the config's learning rate, seed 0, fp32.
        runs: Folder of the runs.
        images: Folder of the generated images.
        output: Markdown file to write.
    """
    folder = Path(runs)
    rate = yaml.safe_load(Path(CONFIG).read_text(encoding="utf-8"))["model"]["init_args"]["learning_rate"]
    common = ["--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", str(epochs)]
    common += ["--data.init_args.root", images, "--trainer.log_every_n_steps", "1"]
    precise, fast = [], []
    for precision in PRECISIONS:
        slow = precision == "16-mixed" and not torch.cuda.is_available()  # 3 s a step where fp32 takes 0.2
        for seed in seeds[:1] if slow else seeds:
            how = ["--trainer.plugins+=benchmarks.stability.HalfOnCPU"] if slow else ["--trainer.precision", precision]
            found = _run([*common, *how, "--seed_everything", str(seed)], folder / f"{precision}-{seed}", images)
            precise.append([precision, seed, *_figures(found), found["skipped"]])
    for factor in factors:
        options = [*common, "--trainer.precision", "32-true", "--model.init_args.learning_rate", str(factor * rate)]
        found = _run(options, folder / f"x{factor:g}", images)
        fast.append([f"{factor:g}", *_figures(found), found["code"], (found["said"] or ["nothing"])[0]])
    shown = ["loss, last epoch", "top-1, seen pairs, %", "top-1, held-out pairs, %"]
    pages(
        [
            heading(f"Stability: {CONFIG}, {epochs} epochs", torch.device("cpu")),
            "## Precision\n\nSkipped: optimizer steps left out for a loss that was no finite number; those that the "
            "gradient scaler of fp16 leaves out to find its scale are not among them.\n",
            table(["precision", "seed", *shown, "skipped"], precise),
            f"## Learning rates too high\n\nFactors on the config's {rate:g}, fp32, seed 0.\n",
            table(["factor", *shown, "exit code", "said"], fast),
        ],
        output,
    )


def _figures(found: dict[str, Any]) -> list[str]:
    return [f"{found['loss']:.3f}", *(f"{100 * found[name]:.1f}" for name in ("seen", "heldout"))]


def _run(options: list[str], folder: Path, images: str) -> dict[str, Any]:
    """Train and evaluate a row, unless that very command was run before."""
    command = ["dtpvit", "fit", "--config", CONFIG, "--trainer.default_root_dir", str(folder), *options]
    kept = folder / "figures.json"
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8")))["command"] == command:
        return found
    done = _call(command)
    if done.returncode not in (0, 2):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [line.removeprefix("dtpvit: ") for line in done.stderr.splitlines() if line.startswith("dtpvit: ")]
    said = [line for line in lines if "learning rate" in line]
    found = {"command": command, "code": done.returncode, "said": said, **_of_metrics(folder / "metrics.csv")}
    for part in ("seen", "heldout"):
        data = f"{images}/{part}"
        asked = ["dtpvit", "zeroshot", "--data", data, "--templates", f"{data}/templates.txt", "--output"]
        asked += [str(folder / f"{part}.json"), "--checkpoint", str(folder / "checkpoints" / "last.ckpt")]
        if _call(asked).returncode == 0:
            found[part] = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))["metrics"]["acc1"]
        else:
            found[part] = float("nan")
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    print(" ".join(command), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment)


def _of_metrics(file: Path) -> dict[str, float]:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    losses = [(int(row["epoch"]), float(row["train/loss"])) for row in rows if row["train/loss"]]
    last = [loss for epoch, loss in losses if epoch == losses[-1][0]]
    skipped = [float(row["train/skipped_steps"]) for row in rows if row.get("train/skipped_steps")]
    return {"loss": sum(last) / len(last), "skipped": max(skipped, default=0.0)}


if __name__ == "__main__":
    auto_cli(stability, as_positional=False)
