"""Measuring several image towers in one run, so that their ratios hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtpvit.encoder import BlockLayouts, DualEncoder
from dtpvit.encoder.reducers.calibration import BoundaryCalibration
from dtpvit.evaluation.classifier import Precision, autocast, evaluating
from dtpvit.evaluation.cost import counted_macs, image_cost, text_macs
from dtpvit.evaluation.measure import Spread
from dtpvit.evaluation.measuring import Memory, Quartiles, alternate, memory_of_step, speed_ups
from dtpvit.evaluation.towers import Tower

__all__ = ["Measured", "Timing", "measure_cost"]


@dataclass(frozen=True)
class Timing:
    """One kind of step of one tower.

    Attributes:
        images_per_second: From the median time.
        seconds: Median time of a step.
        gmacs: Mean GMACs of an image in this very step, backward pass included if it has one.
        speed_up: Over the reference, median over rounds.
        low: Lower quartile of the speed-up.
        high: Upper quartile.
        efficiency: Speed-up over the ratio of GMACs.
        peak_bytes: Most memory beyond what the step found.
        kept_bytes: What the forward pass leaves for the backward pass; under autocast its copies of the weights too.
    """

    images_per_second: float
    seconds: float
    gmacs: float
    speed_up: float
    low: float
    high: float
    efficiency: float
    peak_bytes: int
    kept_bytes: int


@dataclass
class Measured:
    """What is known of one tower.

    Attributes:
        name: As asked for.
        parameters: Of the whole model.
        image_parameters: Of the image tower.
        gmacs: Of an image in evaluation, mean over the batch.
        gmacs_by_part: The same by part of the tower; empty for a tower not of ours.
        text_gmacs: Of a caption: at the captions' mean cost where there are some, else at full context.
        tokens: Tokens an image behind each block's reducer, prefix included, by block.
        timings: By kind: ``forward``, ``training``.
    """

    name: str
    parameters: int
    image_parameters: int
    gmacs: float
    gmacs_by_part: dict[str, float] = field(default_factory=dict)
    text_gmacs: float | None = None
    tokens: dict[int, Spread] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)


def measure_cost(
    towers: Sequence[Tower],
    images: Mapping[str, Tensor],
    device: torch.device,
    *,
    precision: Precision = "fp32",
    rounds: int = 7,
    steps: str = "both",
    captions: Sequence[str] = (),
    calibrate: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> list[Measured]:
    """Measure towers in turn; the first is the reference.

    Args:
        towers: With different names.
        images: Normalised batch of each tower by name, shape (B, 3, H, W).
        device: Where to measure; the towers are moved there.
        precision: Autocast or none.
        rounds: Measured runs of each step.
        steps: ``both``, ``forward`` or ``none``.
        captions: Real captions for the cost of the text tower.
        calibrate: Let predictors that were never calibrated see the images in training mode first, so that counts vary
            from image to image around the nominal rate; otherwise each image keeps exactly the nominal number.
        progress: Called after each run.
    """
    placed = {tower.name: images[tower.name].to(device) for tower in towers}
    for tower in towers:
        tower.whole.to(device)
        if calibrate:
            _calibrate(tower, placed[tower.name])
    results = [_counted(tower, placed[tower.name], captions, device, precision) for tower in towers]
    for kind in ("forward", "training")[: {"none": 0, "forward": 1, "both": 2}[steps]]:
        runs = {tower.name: _Run(tower, placed[tower.name], device, precision, kind == "training") for tower in towers}
        for result, timing in zip(results, _timed(runs, device, rounds, progress), strict=True):
            result.timings[kind] = timing
    return results


def _calibrate(tower: Tower, images: Tensor) -> None:
    """Give a predictor that has never been trained a threshold at which these images keep the nominal share."""
    unset = [m for m in tower.image.modules() if isinstance(m, BoundaryCalibration) and m.boundary_threshold.isnan()]
    if unset:
        tower.image.train()
        with torch.no_grad():
            tower.encode(images)


def _timed(
    runs: Mapping[str, _Run], device: torch.device, rounds: int, progress: Callable[[], object]
) -> Iterator[Timing]:
    """The timing of each run, in order; the first is the reference."""
    memory = {name: run.memory() for name, run in runs.items()}
    seconds = alternate(runs, device, rounds=rounds, warmup=1, progress=progress)
    reference = next(iter(runs))
    ratios = speed_ups(seconds, reference)
    gmacs = {name: run.tower.macs(run.layouts, training=run.train) / 1e9 for name, run in runs.items()}
    for name, run in runs.items():
        middle = Quartiles.of(seconds[name]).median
        yield Timing(
            images_per_second=len(run.images) / middle,
            seconds=middle,
            gmacs=gmacs[name],
            speed_up=ratios[name].median,
            low=ratios[name].low,
            high=ratios[name].high,
            efficiency=ratios[name].median * gmacs[name] / gmacs[reference],
            peak_bytes=memory[name].peak,
            kept_bytes=memory[name].kept,
        )


class _Run:
    """A step of a tower, forward alone or forward and backward."""

    def __init__(self, tower: Tower, images: Tensor, device: torch.device, precision: Precision, train: bool) -> None:
        self.tower, self.images, self.device, self.train = tower, images, device, train
        self.precision: Precision = precision
        self.layouts: tuple[BlockLayouts, ...] = ()

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.train), autocast(self.device, self.precision):
            features, encoding = self.tower.encode(self.images)
            loss = features.float().square().mean()
            if encoding is not None:
                self.layouts = encoding.layouts
                loss = torch.stack([loss, *encoding.losses.values()]).sum()
        return loss

    def __call__(self) -> None:
        self.tower.image.train(self.train)
        for parameter in self.tower.image.parameters():
            parameter.grad = None
        loss = self.forward()
        if self.train:
            loss.backward()

    def memory(self) -> Memory:
        self()  # gradients exist from here on, and what is computed once and kept is there
        self.layouts = ()  # freed now, not while the profiler looks, which would warn of it
        return memory_of_step(self.forward, self.device, backward=self.train)


def _counted(
    tower: Tower, images: Tensor, captions: Sequence[str], device: torch.device, precision: Precision
) -> Measured:
    """Everything that needs no clock."""
    with torch.no_grad(), autocast(device, precision), evaluating(tower.image):
        encoding = tower.encode(images)[1]
    parts: dict[str, float] = {}
    tokens: dict[int, Spread] = {}
    if tower.trunk is not None and encoding is not None:
        cost = image_cost(tower.trunk, encoding.layouts, tower.embed_dim)
        named = {
            "patch embedding": cost.patch_embed,
            "blocks before reduction": cost.full_blocks,
            "predictor or matching": cost.reducers,
            "blocks after reduction": cost.reduced_blocks,
            "projection": cost.projection,
        }
        parts = {name: float(value.mean()) / 1e9 for name, value in named.items()}
        tokens = {int(block): Spread.of(encoding.layouts[int(block)].reduced.lengths) for block in tower.trunk.reducers}
    return Measured(
        name=tower.name,
        parameters=_size(tower.whole),
        image_parameters=_size(tower.image),
        gmacs=tower.macs(() if encoding is None else encoding.layouts) / 1e9,
        gmacs_by_part=parts,
        text_gmacs=_text_gmacs(tower, captions, device),
        tokens=tokens,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _text_gmacs(tower: Tower, captions: Sequence[str], device: torch.device) -> float | None:
    if tower.tokenize is None:
        return None
    rows = tower.tokenize(list(captions) or [""])
    if isinstance(tower.whole, DualEncoder):
        full = torch.tensor([tower.whole.context_length])
        return float(text_macs(tower.whole, rows.argmax(dim=1) + 1 if captions else full).mean()) / 1e9

    class Text(nn.Module):
        def forward(self, text: Tensor) -> Any:
            return tower.whole.encode_text(text)  # pyright: ignore[reportCallIssue]

    return counted_macs(Text(), rows[:1].to(device)) / 1e9
