"""How far a pooled encoder's output is from the same encoder's without pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from dtpvit.encoder import Encoding, VisionEncoder
from dtpvit.evaluation.cost import image_cost
from dtpvit.evaluation.measuring import alternate
from dtpvit.interop.pretrained import Pretrained

__all__ = ["Answers", "Outcome", "answers", "dense_output", "divergence", "forward_seconds", "outcome", "placed"]

Head = Callable[[Tensor], Tensor]


@torch.no_grad()
def dense_output(trunk: VisionEncoder, images: Tensor, head: Head) -> Tensor:
    """What the encoder gives if none of its reducers acts; shape (B, ...) as of ``head``."""
    tokens = trunk.embed(images)
    for block in trunk.blocks:
        tokens = block(tokens)
    return head(trunk.read_out(tokens.with_features(trunk.norm(tokens.features))))


def divergence(found: Tensor, dense: Tensor, *, classes: bool) -> Tensor:
    """How far an output moved, of each image, shape (B,).

    Args:
        found: Of the pooled encoder, shape (B, D).
        dense: Of the dense one, likewise.
        classes: Whether they are logits, whose Kullback-Leibler divergence is taken, in nats; of features it is 1 - the
            cosine.
    """
    if classes:
        ours, theirs = log_softmax(found.float(), dim=1), log_softmax(dense.float(), dim=1)
        return kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return 1 - (normalize(found.float(), dim=1) * normalize(dense.float(), dim=1)).sum(1)


@dataclass(frozen=True)
class Answers:
    """What a model said of images, and what that took.

    Attributes:
        outputs: Logits or features, float32, shape (N, D).
        macs: Of each image, float64, shape (N,).
        decision: Share of the reducers in them, float64, shape (N,).
        tokens: Behind the last block, prefix included, float32, shape (N,).
    """

    outputs: Tensor
    macs: Tensor
    decision: Tensor
    tokens: Tensor


@torch.no_grad()
def answers(candidate: Pretrained, batches: Iterable[Tensor], device: torch.device | str) -> Answers:
    """Run a model over images.

    Args:
        candidate: The model, which is moved to the device.
        batches: uint8, each of shape (B, 3, H, W).
        device: Where to compute.
    """
    encode = placed(candidate, device)
    outputs, macs, decision, tokens = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    for batch in batches:
        found, encoding = encode(candidate.normalise(batch.to(device)))
        cost = image_cost(candidate.trunk, encoding.layouts, found.shape[1])
        outputs.append(found.float().cpu())
        macs.append(cost.total.cpu())
        decision.append(cost.reducers.cpu())
        tokens.append(encoding.tokens.lengths.float().cpu())
    return Answers(torch.cat(outputs), torch.cat(macs), torch.cat(decision), torch.cat(tokens))


@dataclass(frozen=True)
class Outcome:
    """What became of a dense encoder's output.

    Attributes:
        far: Mean divergence, see :func:`divergence`.
        agreement: Share of images with the same first class; None for features.
        top1: Share of images whose first class is their label; None without labels.
        gmacs: Of an image, mean.
        tokens: Of an image behind the last reducer, prefix included, mean.
    """

    far: float
    agreement: float | None
    top1: float | None
    gmacs: float
    tokens: float


def outcome(found: Answers, dense: Answers, *, classes: bool, labels: Tensor | None = None) -> Outcome:
    """Compare a pooled model with the dense one.

    Args:
        found: Of the pooled one.
        dense: Of the dense one, for the same images.
        classes: Whether the outputs are logits of classes.
        labels: Shape (N,), where accuracy is wanted.
    """
    first = found.outputs.argmax(1)
    return Outcome(
        far=divergence(found.outputs, dense.outputs, classes=classes).mean().item(),
        agreement=(first == dense.outputs.argmax(1)).float().mean().item() if classes else None,
        top1=None if labels is None else (first == labels).float().mean().item(),
        gmacs=found.macs.mean().item() / 1e9,
        tokens=found.tokens.mean().item(),
    )


def placed(pretrained: Pretrained, device: torch.device | str) -> Callable[[Tensor], tuple[Tensor, Encoding]]:
    """Move a model to a device; normalised images to output and encoding."""
    pretrained.model.to(device).eval()

    def encode(images: Tensor) -> tuple[Tensor, Encoding]:
        encoding = VisionEncoder.forward(pretrained.trunk, images)
        return pretrained.head(encoding.pooled), encoding

    return encode


def forward_seconds(
    candidates: Mapping[str, Pretrained], images: Tensor, device: torch.device, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds that each model takes for a batch, in each round, the models in turn.

    Args:
        candidates: By name; they are moved to the device.
        images: uint8, shape (B, 3, H, W).
        device: Where to compute.
        rounds: Measured passes of each.
        warmup: Passes of each before that.
    """
    steps: dict[str, Callable[[], object]] = {}
    for name, candidate in candidates.items():
        encode, pixels = placed(candidate, device), candidate.normalise(images.to(device))
        steps[name] = torch.no_grad()(lambda encode=encode, pixels=pixels: encode(pixels))
    return alternate(steps, device, rounds=rounds, warmup=warmup)
