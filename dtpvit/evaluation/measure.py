"""Run an encoder over labelled images: how often it is right, what it keeps of an image, what that costs."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dtpvit.errors import UserError
from dtpvit.evaluation.classifier import Precision, autocast, evaluating, label_ranks

__all__ = ["Spread", "ZeroShotResult", "evaluate"]


@dataclass(frozen=True)
class Spread:
    """How a count varies over images; ``std`` is the population's."""

    mean: float
    std: float
    min: int
    max: int

    @classmethod
    def of(cls, counts: Tensor) -> "Spread":
        values = counts.double()
        return cls(
            mean=values.mean().item(),
            std=values.std(correction=0).item(),
            min=int(counts.min()),
            max=int(counts.max()),
        )


@dataclass(frozen=True)
class ZeroShotResult:
    """What ``evaluate`` found. Accuracies are shares from 0 to 1.

    Attributes:
        acc1: Share of images whose label scores highest.
        acc5: Share whose label is among the first five, or among all classes where these are fewer.
        mean_per_class_recall: ``acc1`` of each class that has images, averaged over classes.
        n: Images evaluated.
        num_classes: Classes to choose from.
        skipped: Images that could not be read.
        not_finite: Images whose features overflowed; they count as wrong.
        class_count: Images of each label.
        class_correct: Top-1 hits of each label.
        images_per_second: Of the image encoder alone, from pixels on the device to features; the first batch,
            which warms up, is left out where there are more.
        tokens: Tokens left after the last reducer, class token included; None for an encoder not of ours.
        gmacs_per_image: Mean multiply-accumulates of the image tower in units of 1e9, likewise.
        gmacs_dense: The same with no reducer.
    """

    acc1: float
    acc5: float
    mean_per_class_recall: float
    n: int
    num_classes: int
    skipped: int
    not_finite: int
    class_count: list[int]
    class_correct: list[int]
    images_per_second: float
    tokens: Spread | None = None
    gmacs_per_image: float | None = None
    gmacs_dense: float | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    classifier: Tensor,
    *,
    device: torch.device | str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    precision: Precision = "fp32",
    progress: bool = False,
) -> ZeroShotResult:
    """Classify every image of ``loader``.

    An encoder of ours (``model.visual.encode`` exists) also reports its tokens and its cost, both counted
    from what its blocks really saw.

    Args:
        model: A CLIP model on ``device``; evaluated in evaluation mode and left as it was.
        loader: Labelled batches. ``class_indices`` on it restricts the classes, ``skipped`` is reported.
        classifier: Shape (D, C), on ``device``.
        device: Where the images are encoded.
        mean: Of the pixels in [0, 1], per channel.
        std: Likewise.
        precision: Of the image tower; the scores are fp32.
        progress: Show a bar if this takes longer than five seconds.

    Raises:
        UserError: No image could be read, or a label has no column.
    """
    device = torch.device(device)
    permitted = getattr(loader, "class_indices", None)
    columns = torch.arange(classifier.shape[1]) if permitted is None else torch.tensor(permitted)
    column_of = torch.full((classifier.shape[1],), -1).index_copy(0, columns, torch.arange(len(columns)))
    classifier = classifier[:, columns.to(device)]
    shift = torch.tensor(mean, device=device).view(3, 1, 1)
    scale = torch.tensor(std, device=device).view(3, 1, 1)
    visual: Any = model.visual
    watch = _Stopwatch(device)
    ranks: list[Tensor] = []
    targets: list[Tensor] = []
    lengths: list[Tensor] = []
    macs: list[Tensor] = []
    with evaluating(model), autocast(device, precision):
        for batch in _progress(loader, progress):
            label = batch["label"]
            _check_labels(label, column_of)
            images = batch["image"].to(device, non_blocking=True).float().div(255).sub(shift).div(scale)
            with watch(len(images)):
                features, encoding = _encode(model, images)
            ranks.append(label_ranks(features, classifier, column_of[label].to(device)).cpu())
            targets.append(label)
            if encoding is not None:
                from dtpvit.evaluation.cost import image_macs

                lengths.append(encoding.tokens.lengths.cpu())
                macs.append(image_macs(visual.trunk, encoding, features.shape[1]).cpu())
    if not ranks:
        raise UserError(
            f"None of the images could be read ({getattr(loader, 'skipped', 0)} were tried): check that the "
            "files are whole images."
        )
    return _result(
        torch.cat(ranks),
        torch.cat(targets),
        columns,
        num_labels=len(column_of),
        tokens=Spread.of(torch.cat(lengths)) if lengths else None,
        macs=torch.cat(macs).mean().item() if macs else None,
        dense=_dense_macs(visual, classifier.shape[0]) if macs else None,
        images_per_second=watch.rate,
        skipped=getattr(loader, "skipped", 0),
    )


def _result(
    ranks: Tensor,
    labels: Tensor,
    columns: Tensor,
    *,
    num_labels: int,
    tokens: Spread | None,
    macs: float | None,
    dense: float | None,
    images_per_second: float,
    skipped: int,
) -> ZeroShotResult:
    num_classes = len(columns)
    count = labels.bincount(minlength=num_labels)
    correct = labels[ranks == 0].bincount(minlength=num_labels)
    present = count > 0
    return ZeroShotResult(
        acc1=(ranks < 1).double().mean().item(),
        acc5=(ranks < min(5, num_classes)).double().mean().item(),
        mean_per_class_recall=(correct[present] / count[present].double()).mean().item(),
        n=len(ranks),
        num_classes=num_classes,
        skipped=skipped,
        not_finite=int((ranks == num_classes).sum()),
        class_count=count.tolist(),
        class_correct=correct.tolist(),
        images_per_second=images_per_second,
        tokens=tokens,
        gmacs_per_image=None if macs is None else macs / 1e9,
        gmacs_dense=None if dense is None else dense / 1e9,
    )


def _encode(model: nn.Module, images: Tensor) -> tuple[Tensor, Any]:
    """Features (B, D), and the encoding of an encoder of ours."""
    any_model: Any = model
    if hasattr(any_model.visual, "encode"):
        return any_model.visual.encode(images)
    return any_model.encode_image(images), None


def _dense_macs(visual: Any, embed_dim: int) -> float:
    from dtpvit.evaluation.cost import dense_macs

    return dense_macs(visual.trunk, embed_dim)


def _check_labels(labels: Tensor, column_of: Tensor) -> None:
    known = (labels >= 0) & (labels < len(column_of))
    known &= column_of[labels.clamp(0, len(column_of) - 1)] >= 0
    if not bool(known.all()):
        raise UserError(
            f"The data has the label {int(labels[~known][0])} but the classifier has only "
            f"{int((column_of >= 0).sum())} classes: give the class names that belong to this data set."
        )


def _progress(loader: Iterable[dict[str, Tensor]], progress: bool) -> Iterable[dict[str, Tensor]]:
    return tqdm(loader, desc="images", unit="batch", delay=5, leave=False, disable=None if progress else True)


class _Stopwatch:
    """Times the encoder; ``rate`` is in images per second."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: list[tuple[int, float]] = []

    @contextmanager
    def __call__(self, images: int) -> Iterator[None]:
        start = self._now()
        yield
        self.laps.append((images, self._now() - start))

    @property
    def rate(self) -> float:
        laps = self.laps[1:] or self.laps
        return sum(images for images, _ in laps) / max(sum(seconds for _, seconds in laps), 1e-9)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()
