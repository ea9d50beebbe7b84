"""Pooling a pretrained classifier without labels: how far its predictions move, on images that nothing was fitted on.

python -m benchmarks.adapt --images DIR --weights FILE --output docs/results/adapt.md
"""

from __future__ import annotations

import time
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.record import heading, pages, table
from dtpvit.datamodules.labelled import LabelledLoader
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.evaluation.agreement import answers, outcome
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.interop.pretrained import load_pretrained
from dtpvit.tasks.adaptation import adapt_encoder

_WHAT = """\
{model}, one pooling step, patches in Hilbert order, every image the same number of tokens, size-proportional attention.
No label was used but for top-1. Learned rows saw {fitted} images; all rows are of {held} other images. KL: mean
divergence of the pooled model's prediction from the dense model's, in nats. Agreement: same first class as the dense
model. One standard error of top-1 is {error:.1f} points; between rows it is smaller, the images being the same. The
dense model: top-1 {top1:.1f} %, {gmacs:.3f} GMACs. GMACs include the finding of segments and the head. Learned:
{steps} steps of {batch_size} images, the same for all; seconds include the closed-form fit.
"""


def _pooling(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "DynamicPooling", "init_args": {"budget": "fixed", **arguments}}


# Name: reducer, and whether there is something to learn.
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "fixed stride": ({"class_path": "FixedStride"}, ""),
    "largest cosine distances": (_pooling(router="cosine"), ""),
    "minimum variance": (_pooling(router="minimum_variance"), ""),
    "sensitivity, exact": (_pooling(router="sensitivity"), "fit"),
    "sensitivity, exact, weights learned": (_pooling(router="sensitivity"), "learn"),
    "adapted (local router, imitation)": (_pooling(router="local", estimator="imitation"), "learn"),
    "local router, regressed votes": (_pooling(router="local", estimator="regression"), "learn"),
    "local router, symmetric vote": (_pooling(router="local", estimator="symmetric"), "learn"),
    "local router, DTP's estimator": (_pooling(router="local", estimator="dtp"), "learn"),
    "local router, H-Net's gate": (_pooling(router="local", estimator="gate"), "learn"),
}


def adapt(
    images: str,
    weights: str,
    model: str = "vit_tiny_patch16_224",
    settings: list[tuple[int, float]] = [(4, 4.0), (4, 2.0), (6, 4.0), (6, 2.0)],  # noqa: B006 (never changed)
    learned: list[tuple[int, float]] = [(4, 4.0)],  # noqa: B006
    limit: int | None = None,
    steps: int = 60,
    batch_size: int = 50,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Compare ways to find segments; the even images are learned from, the odd ones evaluated.

    Args:
        images: Labelled images; the labels are used for top-1 only.
        weights: Of the dense model, classifier included, trained on ImageNet's pixel statistics.
        model: Its name.
        settings: Block that the pooling precedes, and compression.
        learned: For which of these the rows with optimizer steps are run.
        limit: Use this many images only.
        steps: Optimizer steps of these rows.
        batch_size: Images at a time.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    place = chosen_device(device)
    pixels, labels = _images(images, limit)
    fitted, held, truth = pixels[::2], pixels[1::2], labels[1::2]

    def load(reducers: dict[int, Any]) -> Any:
        torch.manual_seed(0)
        return load_pretrained(model, weights, reducers, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    dense = load({})
    said = answers(dense, held.split(batch_size), place)
    base = outcome(said, said, classes=True, labels=truth)
    rows = []
    for block, compression in settings:
        for name, (spec, learns) in METHODS.items():
            if learns == "learn" and (block, compression) not in learned:
                continue
            arguments = {"compression": compression, "order": "hilbert", **spec.get("init_args", {})}
            candidate = load({block: {**spec, "init_args": arguments}})
            start = time.perf_counter()
            if learns:
                taken = steps if learns == "learn" else 0
                adapt_encoder(candidate, fitted, steps=taken, batch_size=batch_size, device=place)
            seconds = f"{time.perf_counter() - start:.0f}" if learns else ""
            found = outcome(answers(candidate, held.split(batch_size), place), said, classes=True, labels=truth)
            assert found.agreement is not None and found.top1 is not None
            shares = [f"{found.far:.3f}", f"{100 * found.agreement:.1f}", f"{100 * found.top1:.1f}"]
            rows.append([f"{name}, {compression:g}x before block {block}", *shares, f"{found.gmacs:.3f}", seconds])
            print(rows[-1], flush=True)
    assert base.top1 is not None
    what = _WHAT.format(
        model=model,
        fitted=len(fitted),
        held=len(held),
        error=100 * (base.top1 * (1 - base.top1) / len(held)) ** 0.5,
        top1=100 * base.top1,
        gmacs=base.gmacs,
        steps=steps,
        batch_size=batch_size,
    )
    header = ["segments", "KL", "agreement, %", "top-1, %", "GMACs", "seconds"]
    pages([heading("Pooling a pretrained classifier without labels", place), what, table(header, rows)], output)


def _images(source: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """uint8 images, classes mixed, and their labels."""
    index = index_labelled(source, limit=limit)
    loader = LabelledLoader(index, image_size=(224, 224), batch_size=50, num_workers=0)
    pairs = [(batch["image"], batch["label"]) for batch in loader]
    return torch.cat([image for image, _ in pairs]), torch.cat([label for _, label in pairs])


if __name__ == "__main__":
    auto_cli(adapt, as_positional=False)
