"""Reducers in a pretrained classifier that was never trained with them: accuracy against cost.

python -m benchmarks.untrained --images DIR --weights FILE --output docs/results/untrained.md
"""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import heading, pages, table
from dtpvit.datamodules.labelled import LabelledLoader
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.encoder.reducers.base import JointThreshold
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.dense_weights import load_dense
from dtpvit.interop.image_models import image_model
from dtpvit.interop.timm_models import TimmVisionEncoder

_WHAT = """\
{model} on {count} images, timm's evaluation transform. One standard error of top-1 is {error:.1f} points; between rows
it is smaller, the images being the same. Agreement: same first class as the dense model. GMACs without the head; in
brackets without the decision either (matching, segmentation), as publications count. Where a reducer needs a threshold,
each half of the images, every other one, is evaluated with that of the other half, from one pass without labels.
"""


def _tome(r: int) -> dict[Any, Any]:
    return {"0-11": {"class_path": "ToMe", "init_args": {"r": r}}}


def _pitome(r: int) -> dict[Any, Any]:
    """As published: the margin falls with depth, and the second half of the blocks protects isolated tokens."""
    each = {"margin": {"from": 0.9, "to": 0.075}, "protect": [block >= 6 for block in range(12)]}
    return {"0-11": {"class_path": "PiToMe", "init_args": {"r": r}, "each": each}}


def _dtome(r: int) -> dict[Any, Any]:
    return {"0-11": {"class_path": "DToMe", "init_args": {"r": r}}}


def _minimum_variance(kept: dict[int, int]) -> dict[Any, Any]:
    """Before each block, so many segments of the 196 patches."""
    rates = [before / (after - 0.5) for before, after in pairwise([196, *kept.values()])]  # counts are rounded up
    arguments = {"router": "minimum_variance", "order": "hilbert"}
    blocks = ",".join(map(str, kept))
    return {blocks: {"class_path": "DynamicPooling", "init_args": arguments, "each": {"compression": rates}}}


def _entropy(compression: float) -> dict[Any, Any]:
    arguments = {"router": "entropy", "compression": compression}
    return {"4": {"class_path": "DynamicPooling", "init_args": arguments}}


def _quadtree(small: float, large: float) -> dict[Any, Any]:
    return {"0": {"class_path": "Quadtree", "init_args": {"thresholds": [small, large]}}}


ROWS: dict[str, dict[Any, Any]] = {
    "dense": {},
    "quadtree, cells below 5.5 and 4 bits": _quadtree(5.5, 4.0),
    "ToMe, r = 8": _tome(8),
    "PiToMe, r = 8": _pitome(8),
    "DToMe, r = 8": _dtome(8),
    "minimum variance, 98 segments before block 6": _minimum_variance({6: 98}),
    "entropy, 98 segments before block 4": _entropy(2),
    "ToMe, r = 12": _tome(12),
    "minimum variance, 49 segments before block 6": _minimum_variance({6: 49}),
    "quadtree, cells below 7.2 and 7.2 bits": _quadtree(7.2, 7.2),
    "ToMe, r = 13": _tome(13),
    "PiToMe, r = 13": _pitome(13),
    "DToMe, r = 13": _dtome(13),
    "minimum variance, 160, 115, 75, 35 segments before 3, 5, 7, 9": _minimum_variance({3: 160, 5: 115, 7: 75, 9: 35}),
    "ToMe, r = 16": _tome(16),
    "PiToMe, r = 16": _pitome(16),
    "DToMe, r = 16": _dtome(16),
    "entropy, 49 segments before block 4": _entropy(4),
    "quadtree, cells below 7.5 and 5.5 bits": _quadtree(7.5, 5.5),
}


def untrained(
    images: str,
    weights: str,
    model: str = "vit_tiny_patch16_224",
    limit: int | None = None,
    batch_size: int = 50,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Compare reducers at about equal cost, none of them trained.

    Args:
        images: Labelled images of ImageNet's classes.
        weights: Of the dense model, classifier included.
        model: Its name, of twelve blocks and 196 patches.
        limit: Use this many images only.
        batch_size: Images at a time.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    place = chosen_device(device)
    index = index_labelled(images, limit=limit)
    loader = LabelledLoader(index, image_size=(224, 224), crop_pct=0.9, batch_size=batch_size, num_workers=0)
    batches = [(batch["image"], batch["label"]) for batch in loader]
    pixels, truth = (torch.cat(parts) for parts in zip(*batches, strict=True))
    rows, dense, top1 = [], torch.empty(0), 0.0
    for name, reducers in tqdm(ROWS.items(), disable=None):
        encoder = image_model({"preset": model, "reducers": reducers}, 1000)
        load_dense(encoder, weights)
        found, gmacs, decision = _evaluated(encoder.to(place).eval(), pixels, batch_size)
        right = (found == truth).double().mean().item()
        if not reducers:
            dense, top1 = found, right
        same = (found == dense).double().mean().item()
        rows.append([name, f"{100 * right:.1f}", f"{100 * same:.1f}", f"{gmacs:.3f} ({gmacs - decision:.3f})"])
    error = 100 * (top1 * (1 - top1) / len(truth)) ** 0.5
    what = _WHAT.format(model=model, count=len(truth), error=error)
    result = table(["reducer", "top-1, %", "agreement, %", "GMACs"], rows)
    pages([heading("Reducers that were never trained", place), what, result], output)


@torch.no_grad()
def _evaluated(encoder: TimmVisionEncoder, images: Tensor, batch_size: int) -> tuple[Tensor, float, float]:
    """Class of each image, shape (images,); mean GMACs of an image, in all and of the reducers' decisions.

    Where reducers learn a threshold from images, every other image is evaluated with that of the rest.
    """
    place = encoder.pos_embed.device
    mean = 255 * torch.tensor([0.485, 0.456, 0.406], device=place).view(3, 1, 1)
    std = 255 * torch.tensor([0.229, 0.224, 0.225], device=place).view(3, 1, 1)
    learns = any(isinstance(made, JointThreshold) and not made.fixed for made in encoder.reducers.values())
    classes, macs = torch.empty(len(images), dtype=torch.int64), list[Tensor]()
    for half in range(2 if learns else 1):
        fresh = deepcopy(encoder)
        if learns:
            fresh.reducers.train()
            for batch in images[1 - half :: 2].split(batch_size):
                fresh.encode((batch.to(place) - mean) / std)
        fresh.eval()
        own = torch.arange(half, len(images), 2 if learns else 1)
        for rows in own.split(batch_size):
            encoding = fresh.encode((images[rows].to(place) - mean) / std)
            cost = image_cost(fresh, encoding.layouts)
            classes[rows] = fresh.head(encoding.pooled).argmax(1).cpu()
            macs.append(torch.stack((cost.total, cost.reducers)).cpu())
    total, decisions = (torch.cat(macs, dim=1).mean(1) / 1e9).tolist()
    return classes, total, decisions


if __name__ == "__main__":
    auto_cli(untrained, as_positional=False)
