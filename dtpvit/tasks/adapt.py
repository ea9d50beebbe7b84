"""``dtpvit adapt``: a pretrained encoder made cheaper on unlabelled images, in minutes, and what that did to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import lightning
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dtpvit.datamodules.real_images import real_images
from dtpvit.errors import UserError
from dtpvit.evaluation.agreement import Outcome, answers, forward_seconds, outcome
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.equal_cost import merge_to_cost
from dtpvit.evaluation.measuring import machine
from dtpvit.interop.checkpoint_format import FORMAT, FORMAT_KEY
from dtpvit.interop.preprocessing import eval_transform
from dtpvit.interop.pretrained import Pretrained, load_pretrained
from dtpvit.output_file import output_file, written_beside
from dtpvit.tasks.adaptation import adapt_encoder

__all__ = ["adapt"]

FEWEST = 16


def adapt(
    model: str,
    images: str,
    compression: float | list[float] = 2.0,
    before: int | list[int] = 6,
    init: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    out: str = "adapted.ckpt",
    limit: int = 1000,
    steps: int = 150,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    order: str = "hilbert",
    router: Literal["local", "sensitivity"] = "local",
    seed: int = 0,
    device: str = "auto",
    rounds: int = 5,
) -> None:
    """Pool the tokens of a pretrained encoder without labels, so that its output moves as little as possible.

    Fits in closed form how much each token matters, then lets the boundary predictor learn the exact segments of least
    variance so weighted, and the weights themselves by the gradient of the output's distance to the dense one. Nothing
    else changes. Half of the images are kept for the comparison it prints, with the dense encoder and with token
    merging (ToMe) at the same cost.

    Args:
        model: timm's name of a Vision Transformer, or open_clip's of a CLIP with one (NAME or NAME:TAG).
        images: A folder of images, or shards; labels are not looked at.
        compression: Tokens in for each token out; a list for several pooling steps.
        before: Block that the pooling precedes; a list, as long.
        init: Weights: a file, or a tag; what timm or open_clip download where it is left out.
        mean: Channel means on [0, 1] that the weights were trained with; those of timm's or open_clip's model if left
            out.
        std: Channel standard deviations, likewise.
        out: Checkpoint to write; `dtpvit cost` and Python load it, a CLIP `dtpvit export` too.
        limit: Use this many images.
        steps: Optimizer steps.
        batch_size: Images a step.
        learning_rate: Highest.
        order: How the patches become a line: hilbert, serpentine, raster.
        router: What finds the segments afterwards. local: a small predictor that has learned to; sensitivity: the exact
            segments themselves, nearer to the dense output, by a recursion over segments at every inference.
        seed: Of the predictor's first weights, the order of images and the draws of the fit.
        device: auto, cpu, cuda.
        rounds: Times that images/s is measured, candidates in turn; 0 leaves it out.
    """
    place, target = chosen_device(device), output_file(out)
    assert target is not None
    if steps < 1 or batch_size < 1 or limit < FEWEST or rounds < 0:
        raise UserError(
            f"steps is {steps}, batch_size {batch_size}, limit {limit}, rounds {rounds}; "
            f"expected at least 1, 1, {FEWEST} and 0 of them"
        )
    blocks = before if isinstance(before, list) else [before]
    rates = list(compression) if isinstance(compression, list) else [float(compression)] * len(blocks)
    load = _Loader(model, init, blocks, rates, order, mean, std)
    dense = load("dense")
    print(f"dtpvit: {dense.transfer.summary}")
    height, width = dense.trunk.image_size
    raw, _ = real_images(images, limit, eval_transform((height, width)), least=FEWEST)
    fitted, held = raw[::2], raw[1::2]
    torch.manual_seed(seed)
    options: dict[str, Any] = {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, "device": place}
    candidates = {
        "dense": dense,
        "minimum variance, exact": load("minimum_variance"),
        "exact, tokens weighted": adapt_encoder(load("sensitivity"), fitted, steps=0, **options),
        "adapted": adapt_encoder(load(router), fitted, steps=steps, **options),
    }
    said = {name: answers(candidate, held.split(batch_size), place) for name, candidate in candidates.items()}
    merging = load.merging(dense.trunk.depth)
    outputs = merging.head(merging.trunk.cls_token[0]).shape[1]
    name = f"ToMe, r = {merge_to_cost(merging.trunk, float(said['adapted'].macs.mean()), outputs)}"
    candidates[name], said[name] = merging, answers(merging, held.split(batch_size), place)
    classes = dense.num_classes > 0
    found = {name: outcome(answer, said["dense"], classes=classes) for name, answer in said.items()}
    speeds = _speeds(candidates, held[:batch_size], place, rounds)
    _show(found, speeds, len(fitted), len(held), classes, place)
    _write(candidates["adapted"], target)


@dataclass(frozen=True)
class _Loader:
    """The same weights with one router or another in front of the same blocks."""

    model: str
    init: str | None
    blocks: list[int]
    rates: Sequence[float]
    order: str
    mean: list[float] | None
    std: list[float] | None

    def merging(self, depth: int) -> Pretrained:
        """The same weights with token merging in all their blocks."""
        reducers: dict[Any, Any] = {f"0-{depth - 1}": {"class_path": "ToMe", "init_args": {"r": 1}}}
        return load_pretrained(self.model, self.init, reducers, mean=self.mean, std=self.std)

    def __call__(self, router: str) -> Pretrained:
        if len(self.blocks) != len(self.rates):
            raise UserError(
                f"before names {len(self.blocks)} blocks and compression {len(self.rates)} rates; give one each"
            )
        made: dict[int, Any] = {}
        for block, rate in zip(self.blocks, self.rates, strict=True):
            learned = {"estimator": "imitation", "budget": "fixed"} if router == "local" else {}
            arguments = {"compression": rate, "order": self.order, "router": router, **learned}
            made[block] = {"class_path": "DynamicPooling", "init_args": arguments}
        return load_pretrained(self.model, self.init, {} if router == "dense" else made, mean=self.mean, std=self.std)


def _speeds(candidates: dict[str, Pretrained], images: Tensor, device: torch.device, rounds: int) -> dict[str, float]:
    """Images/s of each, measured in turn."""
    if not rounds:
        return {}
    seconds = forward_seconds(candidates, images, device, rounds=rounds, warmup=2)
    return {name: len(images) / median(times) for name, times in seconds.items()}


def _show(
    found: dict[str, Outcome], speeds: dict[str, float], fitted: int, held: int, classes: bool, device: torch.device
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "KL, nats" if classes else "1 - cosine", "same class, %", "tokens", "GMACs", "images/s"):
        table.add_column(title, justify="right" if title else "left")
    for name, row in found.items():
        agreement = "" if row.agreement is None else f"{100 * row.agreement:.1f}"
        speed = f"{speeds[name]:.1f}" if speeds else ""
        table.add_row(name, f"{row.far:.4f}", agreement, f"{row.tokens:.1f}", f"{row.gmacs:.3f}", speed)
    console = Console()
    console.print(table)
    console.print(
        f"\nMeans over {held} images that nothing was fitted on; {fitted} others were used, without labels. "
        f"GMACs include the predictor and the head.\n{machine(device)}, fp32",
        highlight=False,
    )


def _write(pretrained: Pretrained, path: Path) -> None:
    about: dict[str, Any] = {"model": pretrained.config}
    if not pretrained.is_clip:
        about |= {"num_classes": pretrained.num_classes, "mean": list(pretrained.mean), "std": list(pretrained.std)}
    elif (pretrained.mean, pretrained.std) != (tuple(OPENAI_DATASET_MEAN), tuple(OPENAI_DATASET_STD)):
        print(f"dtpvit: mind that this model's images are normalised by {pretrained.mean} and {pretrained.std}")
    state = {name: tensor.detach().clone() for name, tensor in pretrained.model.state_dict().items()}
    version = {"pytorch-lightning_version": lightning.__version__}  # without it Lightning takes the file for an old one
    with written_beside(path) as partial:
        torch.save({"state_dict": state, "hyper_parameters": about, FORMAT_KEY: FORMAT, **version}, partial)
    print(f"dtpvit: wrote {path}")
