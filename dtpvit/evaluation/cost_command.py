"""``dtpvit cost``: what a model costs on paper and on the clock, beside a dense reference in the same run."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from datetime import date
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from dtpvit.encoder.reducers.calibration import BoundaryCalibration
from dtpvit.errors import UserError
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.classifier import Precision
from dtpvit.evaluation.comparison import Measured, measure_cost
from dtpvit.evaluation.measuring import machine, versions
from dtpvit.evaluation.towers import Tower, dense_counterpart, load_tower
from dtpvit.output_file import output_file, write_json

__all__ = ["cost"]


def cost(
    models: list[str],
    reference: str | None = None,
    images: str | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str = "auto",
    rounds: int = 7,
    steps: Literal["both", "forward", "none"] = "both",
    json: str | None = None,
) -> None:
    """Count and measure image towers: parameters, GMACs by part, tokens, images/s, memory; what became of the FLOPs.

    Speed-up over FLOP ratio is the efficiency: 1 where every multiplication saved became time saved. It can exceed 1,
    where the reference has overhead of its own.

    Args:
        models: Names of ours, of open_clip's or of timm's, YAMLs of a task, checkpoints, or exported folders. A
            classifier is measured with its head.
        reference: What to compare with, named likewise; the dense model of the shape of our first one if not given.
        images: Folder of images, or shards, to measure on; random pixels if not given. On these a predictor that was
            never trained keeps the nominal number of every image; on real images it is given the threshold at which
            this batch keeps the nominal share, so that counts vary.
        batch_size: Images at a time.
        precision: Of the image towers.
        device: auto, cpu, cuda, cuda:1, ...
        rounds: Times that each step is measured, candidates in turn.
        steps: Measure forward and training step, the forward pass only, or nothing (MACs and tokens are still counted).
        json: JSON file for everything that was measured.
    """
    place, target = chosen_device(device), output_file(json)
    if batch_size < 1 or rounds < 1:
        raise UserError(f"batch_size is {batch_size} and rounds is {rounds}; both must be at least 1")
    torch.manual_seed(0)
    towers = [load_tower(spec) for spec in dict.fromkeys(models)]
    ours = next((tower for tower in towers if tower.trunk is not None), towers[0])
    base = dense_counterpart(ours) if reference is None else load_tower(reference)
    towers = [base, *(tower for tower in towers if tower.name != base.name)]
    trained = any(_is_trained(tower) for tower in towers)  # measuring training steps sets thresholds too
    captions = list[str]()
    pixels = dict[str, Tensor]()
    for tower in towers:
        pixels[tower.name], captions = tower.pixels(images, batch_size)
    with _bar(len(towers), rounds, steps) as bar:
        results = measure_cost(
            towers,
            pixels,
            place,
            precision=precision,
            rounds=rounds,
            steps=steps,
            captions=captions,
            calibrate=images is not None,
            progress=bar.update,
        )
    what = f"{batch_size} images of random pixels" if images is None else f"{batch_size} images of {images}"
    if images is None and trained:
        what += "; a trained predictor keeps other numbers of tokens of photographs: give --images"
    how = f"{machine(place)}, {precision}, {what}"
    _show(results, how)
    if target is not None:
        record = {
            "machine": machine(place),
            "versions": versions(),
            "date": date.today().isoformat(),
            "command": shlex.join(["dtpvit", *sys.argv[1:]]),
            "reference": base.name,
            "batch_size": batch_size,
            "precision": precision,
            "images": images,
            "models": [asdict(result) for result in results],
        }
        write_json(target, record)


def _is_trained(tower: Tower) -> bool:
    found = (module for module in tower.image.modules() if isinstance(module, BoundaryCalibration))
    return any(not module.boundary_threshold.isnan() for module in found)


def _bar(towers: int, rounds: int, steps: str) -> tqdm:
    kinds = {"both": 2, "forward": 1, "none": 0}[steps]
    return tqdm(total=kinds * towers * (rounds + 1), desc="measuring", unit="step", leave=False, disable=None)


def _show(results: list[Measured], how: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right", overflow="fold")
    for title, cells in _rows(results):
        if any(cells):
            table.add_row(title, *cells)
    console = Console()
    console.print(table)
    console.print(
        f"\nReference: {results[0].name}. GMACs: 1e9 multiply-accumulates. Speed-ups: medians over rounds, quartiles "
        f"in brackets. Efficiency: speed-up / FLOP ratio; above 1 the reference has overhead of its own.\n{how}",
        highlight=False,
    )


def _rows(results: list[Measured]) -> list[tuple[str, list[str]]]:
    """Lines of the table; a line without any entry is left out."""
    base = results[0]
    parts = list(dict.fromkeys(part for result in results for part in result.gmacs_by_part))
    rows = [
        ("parameters, M", [f"{r.parameters / 1e6:.1f}" for r in results]),
        ("  image tower", [f"{r.image_parameters / 1e6:.1f}" for r in results]),
        ("GMACs an image", [f"{r.gmacs:.3f}" for r in results]),
    ]
    rows += [(f"  {part}", [_number(r.gmacs_by_part.get(part), ".3f") for r in results]) for part in parts]
    rows += [("GMACs a caption", [_number(r.text_gmacs, ".3f") for r in results])]
    blocks = sorted({block for r in results for block in r.tokens})
    rows += [(f"tokens from block {block}", [_tokens(r, block) for r in results]) for block in blocks]
    if not base.timings:
        rows += [("FLOP ratio", [f"{base.gmacs / r.gmacs:.2f}" for r in results])]
    for kind, title in (("forward", "forward"), ("training", "training step")):
        found = [r.timings.get(kind) for r in results]
        rows += [
            (f"{title}, images/s", [(t and f"{t.images_per_second:.1f}") or "" for t in found]),
            ("  FLOP ratio", [(t and f"{base.timings[kind].gmacs / t.gmacs:.2f}") or "" for t in found]),
            ("  speed-up", [(t and f"{t.speed_up:.2f} ({t.low:.2f}-{t.high:.2f})") or "" for t in found]),
            ("  efficiency", [(t and f"{t.efficiency:.2f}") or "" for t in found]),
            ("  peak beyond weights and gradients, MiB", [(t and f"{t.peak_bytes / 2**20:.0f}") or "" for t in found]),
        ]
    saved = [r.timings["training"].kept_bytes if "training" in r.timings else 0 for r in results]
    rows += [
        ("saved activations, MiB", [(value and f"{value / 2**20:.0f}") or "" for value in saved]),
        ("  of the reference's", [(value and f"{value / saved[0]:.3f}") or "" for value in saved]),
    ]
    return rows


def _tokens(result: Measured, block: int) -> str:
    spread = result.tokens.get(block)
    if spread is None:
        return ""
    return f"{spread.mean:.1f}" if spread.min == spread.max else f"{spread.mean:.1f} ({spread.min}-{spread.max})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
