"""Pooling a pretrained classifier without training it: how far its predictions move, on images not fitted on.

python -m benchmarks.adapt --images DIR --weights FILE --output docs/results/adapt.md
"""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks.record import heading, pages, table
from dtpvit.datamodules.labelled import LabelledLoader
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.cost import image_macs
from dtpvit.interop.create import create_encoder
from dtpvit.interop.weight_files import read_checkpoint, state_of
from dtpvit.tasks.sensitivity import fit_sensitivity

_WHAT = """\
{model}, one pooling step, patches in Hilbert order, every image the same number of tokens, size-proportional attention.
No label and no training step was used. `sensitivity` was fitted in closed form on {fitted} images; all rows are of
{held} other images. KL: mean divergence of the pooled model's prediction from the dense model's, in nats. Agreement:
same first class as the dense model. One standard error of top-1 is {error:.1f} points; between rows it is smaller, the
images being the same. The dense model: top-1 {top1:.1f} %, {gmacs:.3f} GMACs. GMACs include what finding the segments
costs, head left out.
"""

METHODS: dict[str, dict[str, Any]] = {
    "fixed stride": {"class_path": "FixedStride"},
    "largest cosine distances": {"class_path": "DynamicPooling", "init_args": {"router": "cosine", "budget": "fixed"}},
    "minimum variance": {"class_path": "DynamicPooling", "init_args": {"router": "minimum_variance"}},
    "sensitivity": {"class_path": "DynamicPooling", "init_args": {"router": "sensitivity"}},
}


def adapt(
    images: str,
    weights: str,
    model: str = "vit_tiny_patch16_224",
    settings: list[tuple[int, float]] = [(4, 4.0), (4, 2.0), (6, 4.0), (6, 2.0)],  # noqa: B006 (never changed)
    limit: int | None = None,
    batch_size: int = 50,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Compare ways to find segments; the even images are fitted on, the odd ones evaluated.

    Args:
        images: Labelled images; the labels are used for top-1 only.
        weights: Of the dense model, classifier included.
        model: Its name.
        settings: Block that the pooling precedes, and compression.
        limit: Use this many images only.
        batch_size: Images at a time.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    place = chosen_device(device)
    batches, labels = _images(images, limit, batch_size)
    fitted, held, truth = batches[::2], batches[1::2], torch.cat(labels[1::2])
    head = _head(weights).to(place)
    dense, gmacs = _predict(create_encoder(model, init=weights).to(place).eval(), head, held)
    top1 = (dense.argmax(1) == truth).float().mean().item()
    rows = []
    for block, compression in settings:
        for name, spec in METHODS.items():
            arguments = {"compression": compression, "order": "hilbert", **spec.get("init_args", {})}
            reducers = {block: {**spec, "init_args": arguments}}
            encoder = create_encoder(model, reducers=reducers, init=weights).to(place).eval()
            explained = ""
            if name == "sensitivity":
                generator = torch.Generator(place).manual_seed(0)
                moved = [batch.to(place) for batch in fitted]
                shares = fit_sensitivity(encoder, moved, head=head, classes=True, generator=generator)
                explained = f"{shares[block]:.2f}"
            found, cost = _predict(encoder, head, held)
            far = kl_div(found, dense, log_target=True, reduction="batchmean").item()
            same = (found.argmax(1) == dense.argmax(1)).float().mean().item()
            right = (found.argmax(1) == truth).float().mean().item()
            row = [f"{name}, {compression:g}x before block {block}", f"{far:.3f}", f"{100 * same:.1f}"]
            rows.append([*row, f"{100 * right:.1f}", f"{cost:.3f}", explained])
    what = _WHAT.format(
        model=model,
        fitted=sum(map(len, fitted)),
        held=len(truth),
        error=100 * (top1 * (1 - top1) / len(truth)) ** 0.5,
        top1=100 * top1,
        gmacs=gmacs,
    )
    header = ["segments", "KL", "agreement, %", "top-1, %", "GMACs", "variance explained by the fit"]
    pages([heading("Pooling a pretrained classifier without training", place), what, table(header, rows)], output)


def _images(source: str, limit: int | None, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches normalised as ImageNet models want them, classes mixed, and their labels."""
    index = index_labelled(source, limit=limit)
    loader = LabelledLoader(index, image_size=(224, 224), batch_size=batch_size, num_workers=0)
    pairs = [(batch["image"], batch["label"]) for batch in loader]
    mean = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return [(image - mean) / std for image, _ in pairs], [label for _, label in pairs]


def _head(weights: str) -> torch.nn.Linear:
    state = state_of(read_checkpoint(weights))
    head = torch.nn.Linear(state["head.weight"].shape[1], state["head.weight"].shape[0])
    head.load_state_dict({"weight": state["head.weight"], "bias": state["head.bias"]})
    return head.requires_grad_(False)


@torch.no_grad()
def _predict(encoder: Any, head: torch.nn.Linear, batches: list[Tensor]) -> tuple[Tensor, float]:
    """Logarithms of the class probabilities, shape (images, classes), on the CPU; and mean GMACs of an image."""
    found, macs = [], []
    for batch in batches:
        encoding = encoder(batch.to(head.weight.device))
        found.append(head(encoding.pooled).log_softmax(-1).cpu())
        macs.append(image_macs(encoder, encoding).cpu())
    return torch.cat(found), float(torch.cat(macs).mean()) / 1e9


if __name__ == "__main__":
    auto_cli(adapt, as_positional=False)
