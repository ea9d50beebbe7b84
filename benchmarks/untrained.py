"""Reducers in a pretrained classifier that was never trained with them: accuracy against cost.

python -m benchmarks.untrained --images DIR --weights FILE --output docs/results/untrained.md
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import heading, pages, table
from dtpvit.datamodules.labelled import LabelledLoader
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.dense_weights import load_dense
from dtpvit.interop.image_models import image_model
from dtpvit.interop.timm_models import TimmVisionEncoder

_WHAT = """\
{model} on {count} images, timm's evaluation transform. One standard error of top-1 is {error:.1f} points; between rows
it is smaller, the images being the same. Agreement: same first class as the dense model. GMACs without the head; in
brackets without the decision either (matching, segmentation), as publications count.
"""


def _tome(r: int) -> dict[Any, Any]:
    return {"0-11": {"class_path": "ToMe", "init_args": {"r": r}}}


def _minimum_variance(kept: dict[int, int]) -> dict[Any, Any]:
    """Before each block, so many segments of the 196 patches."""
    rates = [before / (after - 0.5) for before, after in pairwise([196, *kept.values()])]  # counts are rounded up
    arguments = {"router": "minimum_variance", "order": "hilbert"}
    blocks = ",".join(map(str, kept))
    return {blocks: {"class_path": "DynamicPooling", "init_args": arguments, "each": {"compression": rates}}}


ROWS: dict[str, dict[Any, Any]] = {
    "dense": {},
    "ToMe, r = 8": _tome(8),
    "minimum variance, 98 segments before block 6": _minimum_variance({6: 98}),
    "ToMe, r = 12": _tome(12),
    "minimum variance, 49 segments before block 6": _minimum_variance({6: 49}),
    "windowed ToMe in block 6, at random": {6: {"class_path": "WindowedToMe"}},
    "windowed ToMe in block 6, by parts": {6: {"class_path": "WindowedToMe", "init_args": {"matching": "parts"}}},
    "2 x 2 averages before block 6": {6: {"class_path": "GridPooling"}},
    "ToMe, r = 13": _tome(13),
    "minimum variance, 160, 115, 75, 35 segments before 3, 5, 7, 9": _minimum_variance({3: 160, 5: 115, 7: 75, 9: 35}),
    "ToMe, r = 16": _tome(16),
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
    truth = torch.cat([label for _, label in batches])
    rows, dense, top1 = [], torch.empty(0), 0.0
    for name, reducers in tqdm(ROWS.items(), disable=None):
        encoder = image_model({"preset": model, "reducers": reducers}, 1000)
        load_dense(encoder, weights)
        found, gmacs, decision = _evaluated(encoder.to(place).eval(), [image for image, _ in batches])
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
def _evaluated(encoder: TimmVisionEncoder, images: list[Tensor]) -> tuple[Tensor, float, float]:
    """Class of each image, shape (images,); mean GMACs of an image, in all and of the reducers' decisions."""
    place = encoder.pos_embed.device
    mean = 255 * torch.tensor([0.485, 0.456, 0.406], device=place).view(3, 1, 1)
    std = 255 * torch.tensor([0.229, 0.224, 0.225], device=place).view(3, 1, 1)
    classes, total, decisions = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch in images:
        encoding = encoder.encode((batch.to(place) - mean) / std)
        cost = image_cost(encoder, encoding.layouts)
        classes.append(encoder.head(encoding.pooled).argmax(1).cpu())
        total.append(cost.total.cpu())
        decisions.append(cost.reducers.cpu())
    return torch.cat(classes), float(torch.cat(total).mean()) / 1e9, float(torch.cat(decisions).mean()) / 1e9


if __name__ == "__main__":
    auto_cli(untrained, as_positional=False)
