"""Contrastive steps on batches that do not fit at once, with the negatives and the gradient of the whole batch.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), 2021: features of
all micro-batches without a graph, the loss and its gradient at the features, then each micro-batch again with a graph
to carry that gradient on. Both passes see the same noise: the Gumbel noise is a function of each image's seed, and
torch's generators are put back for dropout and stochastic depth. The boundary threshold is that of the whole batch,
over all micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from dtpvit.encoder import ImageEncoder, VisionEncoder
from dtpvit.encoder.reducers.base import JointThreshold
from dtpvit.tasks.token_count import TokenCount

__all__ = ["CachedStep", "Features", "RandomState", "average_gradients", "joint_thresholds"]

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What the loss needs of a micro-batch: normalised features, each (B, embed_dim), and the reducers' loss.

    ``count`` is what became of its images, for the record.
    """

    image: Tensor
    text: Tensor
    penalty: Tensor
    count: TokenCount


Forward = Callable[[Batch, Mapping[int, Tensor]], Features]


class RandomState:
    """torch's generators as they are now, to be put back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.host)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


@torch.no_grad()
def joint_thresholds(trunk: ImageEncoder, images: list[Tensor], seeds: list[Tensor]) -> dict[int, Tensor]:
    """Training threshold of each reducer over all micro-batches and ranks; also calibrates evaluation.

    Args:
        trunk: The encoder, in training mode.
        images: Normalised, one (B, 3, H, W) a micro-batch.
        seeds: One (B,) a micro-batch.
    """
    thresholds: dict[int, Tensor] = {}
    for key in sorted(trunk.reducers, key=int):
        reducer = trunk.reducers[key]
        if not isinstance(reducer, JointThreshold):
            continue
        assert isinstance(trunk, VisionEncoder)
        state = RandomState(images[0].device)
        found = []
        for micro, seed in zip(images, seeds, strict=True):
            found.append(trunk.boundary_scores(micro, int(key), seeds=seed, thresholds=thresholds))
        state.restore()
        scores = [score for score, _ in found if score is not None]
        if scores:
            patches = sum(count for _, count in found)
            thresholds[int(key)] = reducer.set_threshold(torch.cat(scores, dim=1), patches, sum(map(len, images)))
    return thresholds


class CachedStep:
    """One optimizer step in micro-batches.

    Args:
        micro_batches: The pieces of the batch.
        forward: Features of a piece, given thresholds.
        thresholds: As :func:`joint_thresholds` gives them.
    """

    def __init__(self, micro_batches: list[Batch], forward: Forward, thresholds: Mapping[int, Tensor]) -> None:
        self.micro_batches, self.forward, self.thresholds = micro_batches, forward, thresholds
        self.states: list[RandomState] = []
        cached: list[Features] = []
        with torch.no_grad():
            for micro in micro_batches:
                self.states.append(RandomState(micro["image"].device))
                cached.append(forward(micro, thresholds))
        self.image = torch.cat([features.image for features in cached]).requires_grad_()
        self.text = torch.cat([features.text for features in cached]).requires_grad_()
        self.penalty = torch.stack([features.penalty for features in cached]).requires_grad_()
        self.count = reduce(add, [features.count for features in cached])

    def backward(self, context: Callable[[], AbstractContextManager[object]]) -> None:
        """Carry the gradient at the cached features, left there by the loss, on to the parameters.

        Args:
            context: The precision plugin's forward context, so that the second pass rounds like the first.
        """
        sizes = [len(micro["image"]) for micro in self.micro_batches]
        assert self.image.grad is not None and self.text.grad is not None
        penalty_grad = torch.zeros_like(self.penalty) if self.penalty.grad is None else self.penalty.grad
        grads = zip(self.image.grad.split(sizes), self.text.grad.split(sizes), penalty_grad, strict=True)
        end = RandomState(self.image.device)
        for micro, state, (image, text, penalty) in zip(self.micro_batches, self.states, grads, strict=True):
            state.restore()
            with context():
                features = self.forward(micro, self.thresholds)
            outputs, outside = [features.image, features.text], [image, text]
            if features.penalty.requires_grad:
                outputs.append(features.penalty)
                outside.append(penalty)
            torch.autograd.backward(outputs, outside)
        end.restore()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of every gradient over the ranks, in one collective for each data type."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        same = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in same])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for grad, part in zip(same, flat.split([grad.numel() for grad in same]), strict=True):
            grad.copy_(part.view_as(grad))
