"""Runs compared image by image: means over seeds, and differences with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.classification_rows import Row
from benchmarks.record import table

__all__ = ["compared", "difference"]

_WHAT = """\
{seeds} seeds a row, {images} test images, the last epoch's weights. Mean, and in brackets the standard deviation over
seeds. Differences are paired: the same images, the same seeds. Their standard error has both parts, that of the images
(of each image's difference averaged over seeds) and that of the seeds. In bold: more than two standard errors. Tokens
include the class token; minutes are of training, one run, on a machine that did other things too.
"""


def difference(row: Tensor, base: Tensor) -> tuple[float, float]:
    """Mean of row - base, and its standard error over images and seeds.

    Args:
        row: Shape (seeds, images).
        base: Likewise, of the same seeds and images.
    """
    gap = row - base
    seeds, images = gap.shape
    of_images = gap.mean(0).var() / images
    of_seeds = gap.mean(1).var() / seeds if seeds > 1 else torch.zeros(())
    return gap.mean().item(), (of_images + of_seeds).sqrt().item()


def compared(found: Mapping[str, Sequence[Mapping[str, Any]]], rows: Mapping[str, Row], base: str) -> str:
    """The table, in Markdown.

    Args:
        found: By row, for each seed what benchmarks/classification.py keeps of every image.
        rows: What the rows are.
        base: What all are compared with.
    """
    losses = {name: torch.tensor([run["loss"] for run in runs], dtype=torch.float64) for name, runs in found.items()}
    right = {name: torch.tensor([run["right"] for run in runs], dtype=torch.float64) for name, runs in found.items()}
    lines = []
    for name, runs in found.items():
        against = ["", ""]
        if name != base and base in found:
            gap, error = difference(losses[name], losses[base])
            points, spread = difference(100 * right[name], 100 * right[base])
            against = [_marked(gap, error, 3), _marked(points, spread, 1)]
        tokens, gmacs = (_mean([_mean(run[key]) for run in runs]) for key in ("tokens", "gmacs"))
        cost = [f"{tokens:.1f}", f"{gmacs:.3f}", f"{_mean([run['minutes'] for run in runs]):.1f}"]
        accuracy, loss = _spread(100 * right[name].mean(1), 1), _spread(losses[name].mean(1), 3)
        lines.append([rows[name].what, accuracy, loss, *against[::-1], *cost])
    header = ["row", "top-1, %", "cross-entropy", f"top-1 against {base}", f"cross-entropy against {base}"]
    images = next(iter(losses.values())).shape[1]
    what = _WHAT.format(seeds=len(next(iter(found.values()))), images=images)
    return what + "\n" + table([*header, "tokens", "GMACs", "minutes"], lines)


def _marked(gap: float, error: float, digits: int) -> str:
    text = f"{gap:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if abs(gap) > 2 * error else text


def _spread(values: Tensor, digits: int) -> str:
    spread = f" ({values.std():.{digits}f})" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
