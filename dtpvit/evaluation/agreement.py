"""How far a pooled encoder's output is from the same encoder's without pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from dtpvit.encoder import Encoding, VisionEncoder
from dtpvit.evaluation.cost import image_macs
from dtpvit.interop.pretrained import Pretrained

__all__ = ["Outcome", "dense_output", "divergence", "outcome", "placed"]

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


@torch.no_grad()
def outcome(
    candidate: Pretrained,
    dense: Pretrained,
    images: Tensor,
    device: torch.device | str,
    *,
    labels: Tensor | None = None,
    batch_size: int = 32,
) -> Outcome:
    """Compare a pooled model with the dense one.

    Args:
        candidate: The pooled one.
        dense: The dense one.
        images: uint8, shape (N, 3, H, W).
        device: Where to compute; both models are moved there.
        labels: Shape (N,), where accuracy is wanted.
        batch_size: Images at a time.
    """
    encode, reference = placed(candidate, device), placed(dense, device)
    outputs, wanted, macs, tokens = [], [], [], []
    for batch in images.split(batch_size):
        pixels = candidate.normalise(batch.to(device))
        found, encoding = encode(pixels)
        outputs.append(found)
        wanted.append(reference(pixels)[0])
        macs.append(image_macs(candidate.trunk, encoding, found.shape[1]))
        tokens.append(encoding.tokens.lengths.float())
    found, target = torch.cat(outputs), torch.cat(wanted)
    classes = dense.num_classes > 0
    first = found.argmax(1)
    return Outcome(
        far=divergence(found, target, classes=classes).mean().item(),
        agreement=(first == target.argmax(1)).float().mean().item() if classes else None,
        top1=None if labels is None else (first.cpu() == labels).float().mean().item(),
        gmacs=torch.cat(macs).mean().item() / 1e9,
        tokens=torch.cat(tokens).mean().item(),
    )


def placed(pretrained: Pretrained, device: torch.device | str) -> Callable[[Tensor], tuple[Tensor, Encoding]]:
    """Move a model to a device; normalised images to output and encoding."""
    pretrained.model.to(device).eval()

    def encode(images: Tensor) -> tuple[Tensor, Encoding]:
        encoding = VisionEncoder.forward(pretrained.trunk, images)
        return pretrained.head(encoding.pooled), encoding

    return encode
