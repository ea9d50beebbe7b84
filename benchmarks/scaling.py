"""How cost grows with image size and with batch size, counted and measured, on one plot.

python -m benchmarks.scaling --output docs/results/scaling.md --plot docs/results/scaling.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.record import heading, pages, table
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.classifier import Precision, autocast
from dtpvit.evaluation.measuring import Quartiles, alternate
from dtpvit.evaluation.towers import Tower, load_tower

_WHAT = """\
Forward pass in evaluation, {precision}, random pixels at the nominal rate; medians of {rounds} rounds in which all
models run in turn. Left: one batch of {batch} at each image size. Right: batch sizes at {size} pixels.

![cost against image size and batch size]({plot})
"""


def scaling(
    models: list[str] = [  # noqa: B006 (never changed)
        "vit_small_patch16_224",
        "dtp_vit_small_patch16_224_4x",
        "dtp_vit_small_patch16_224_10x",
    ],
    image_sizes: list[int] = [224, 384, 512, 640, 896],  # noqa: B006
    batch_sizes: list[int] = [1, 4, 16, 64],  # noqa: B006
    batch: int = 2,
    precision: Precision = "fp32",
    rounds: int = 5,
    device: str = "auto",
    output: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure towers over image sizes and batch sizes; the first is the reference.

    Args:
        models: Names of timm's or ours.
        image_sizes: Side of the images, in pixels.
        batch_sizes: Images at a time, at the first image size.
        batch: Images at a time over image sizes.
        precision: Of the towers.
        rounds: Measured runs of each.
        device: auto, cpu, cuda.
        output: Markdown file to write.
        plot: PNG file to write.
    """
    place = chosen_device(device)
    torch.manual_seed(0)
    towers = [load_tower(name) for name in models]
    by_batch = {n: _measure(towers, image_sizes[0], n, precision, rounds, place) for n in batch_sizes}
    by_size = {side: _measure(towers, side, batch, precision, rounds, place) for side in image_sizes}
    shown = Path(plot).name if plot else "scaling.png"
    what = _WHAT.format(precision=precision, rounds=rounds, batch=batch, size=image_sizes[0], plot=shown)
    header = ["", *(f"{name}: ms an image (GMACs)" for name in models), *(f"{name}: efficiency" for name in models[1:])]
    parts = [heading("Cost against image size and batch size", place), what]
    parts += ["## Image size\n", table(["pixels", *header[1:]], [_row(side, found) for side, found in by_size.items()])]
    parts += ["## Batch size\n", table(["batch", *header[1:]], [_row(n, found) for n, found in by_batch.items()])]
    pages(parts, output)
    if plot:
        _plot(models, by_size, by_batch, plot)


Point = tuple[float, float]
"""Milliseconds and GMACs of an image."""


def _measure(
    towers: Sequence[Tower], side: int, batch: int, precision: Precision, rounds: int, device: torch.device
) -> list[Point]:
    images = torch.randn(batch, 3, side, side, device=device)
    gmacs = [_sized(tower, side, images[:1].to(device)) for tower in towers]

    @torch.no_grad()
    def step(tower: Tower) -> None:
        with autocast(device, precision):
            tower.image(images)

    steps = {tower.name: (lambda tower=tower: step(tower)) for tower in towers}
    seconds = alternate(steps, device, rounds=rounds, warmup=1)
    return [
        (1000 * Quartiles.of(seconds[tower.name]).median / batch, macs)
        for tower, macs in zip(towers, gmacs, strict=True)
    ]


@torch.no_grad()
def _sized(tower: Tower, side: int, example: Tensor) -> float:
    """Make a tower ready for images of another size; GMACs of one."""
    image: Any = tower.image.to(example.device).eval()
    image.set_input_size(img_size=(side, side))
    encoding = tower.encode(example)[1]
    sized = Tower(**{**vars(tower), "image_size": (side, side)})
    return sized.macs(() if encoding is None else encoding.layouts) / 1e9


def _row(label: int, found: Sequence[Point]) -> list[object]:
    base_time, base_gmacs = found[0]
    efficiency = [base_time / time * gmacs / base_gmacs for time, gmacs in found[1:]]
    return [label, *(f"{time:.1f} ({gmacs:.2f})" for time, gmacs in found), *(f"{e:.2f}" for e in efficiency)]


def _plot(models: Sequence[str], by_size: dict[int, list[Point]], by_batch: dict[int, list[Point]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for index, name in enumerate(models):
        colour = f"C{index}"
        times = [found[index][0] for found in by_size.values()]
        left.plot(list(by_size), times, "o-", color=colour, label=name)
        # The dense model's pace at the smallest size, applied to the GMACs: where time would be if FLOPs were all.
        time, gmacs = next(iter(by_size.values()))[0]
        ideal = [found[index][1] * time / gmacs for found in by_size.values()]
        left.plot(list(by_size), ideal, ":", color=colour, label="_")
        right.plot(list(by_batch), [1000 / found[index][0] for found in by_batch.values()], "o-", color=colour)
    left.plot([], [], ":", color="grey", label="from GMACs alone, at the dense model's pace")
    left.set(xlabel="image side, pixels", ylabel="ms an image", yscale="log", xticks=list(by_size))
    right.set(xlabel="batch size", ylabel="images/s", xscale="log", xticks=list(by_batch), ylim=(0, None))
    right.set_xticklabels([str(n) for n in by_batch])
    right.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    auto_cli(scaling, as_positional=False)
