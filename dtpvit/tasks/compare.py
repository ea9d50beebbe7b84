"""``dtpvit compare``: ways of reducing the tokens of one pretrained model, beside each other on the same images."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from timm.models import get_pretrained_cfg
from torch import Tensor
from tqdm import tqdm

from dtpvit.datamodules.labelled import LabelledLoader
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.datamodules.real_images import real_images
from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import TokenReducer
from dtpvit.errors import UserError
from dtpvit.evaluation.agreement import Answers, answers, forward_seconds, outcome
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.compared_rows import ComparedRow, read_rows
from dtpvit.evaluation.kept_rows import KeptRows, content_digest
from dtpvit.evaluation.measuring import machine, speed_ups, versions
from dtpvit.evaluation.trade_off import ComparedResult, draw, shown, write
from dtpvit.interop.preprocessing import eval_transform
from dtpvit.interop.pretrained import Pretrained, load_pretrained
from dtpvit.interop.reducer_config import reducer_makers
from dtpvit.tasks.fitting import cross_fitted_answers, fit_reducers, has_to_fit

__all__ = ["compare"]


def compare(
    reducers: list[str],
    model: str,
    images: str,
    init: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    fit: str | None = None,
    limit: int = 1000,
    batch_size: int = 50,
    crop_pct: float | None = None,
    rounds: int = 5,
    seed: int = 0,
    device: str = "auto",
    out: str = "comparison",
) -> None:
    """Accuracy, cost and speed of a pretrained model with its tokens reduced in several ways, nothing trained.

    Each row is kept in OUT/rows as soon as it is known: the same command goes on where it was stopped, and computes
    anew what would no longer be the same, of other pixels, weights, arguments or versions. Writes comparison.md, .csv,
    .json, .png and .svg.

    Args:
        reducers: YAML files that map blocks to reducers, such as configs/reducers/tome.yaml, or hold several such rows
            in series, such as configs/compare/untrained.yaml.
        model: timm's name of a Vision Transformer, or open_clip's of a CLIP with one (NAME or NAME:TAG).
        images: Labelled images (class folders, ImageNet's validation folder, shards); of a CLIP any images.
        init: Weights: a file, or a tag; what timm or open_clip download where it is left out.
        mean: Channel means on [0, 1]; those of timm's or open_clip's model if left out.
        std: Channel standard deviations, likewise.
        fit: Unlabelled images, others than those compared on, on which rows with something to fit settle their
            thresholds and the weights of their tokens; or "halves": for each half of the images, every other one, the
            other half. Without it thresholds are nominal counts and all tokens count the same.
        limit: Use this many images, evenly spaced; of those to fit on at most as many.
        batch_size: Images at a time.
        crop_pct: Share of the short side that the evaluation crop keeps; timm's for the model if left out.
        rounds: Times that images/s is measured, each row in turn with the dense model; 0 leaves it out.
        seed: Of what is drawn.
        device: auto, cpu, cuda.
        out: Folder to write.
    """
    place, asked = chosen_device(device), read_rows(reducers)
    if batch_size < 1 or limit < 1 or rounds < 0:
        raise UserError(f"batch_size is {batch_size}, limit {limit}, rounds {rounds}; expected at least 1, 1 and 0")
    folder = Path(out).expanduser()
    try:
        (folder / "rows").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the results cannot be written to {out} ({error.strerror}); give another folder") from error

    def load(spec: dict[Any, Any]) -> Pretrained:
        torch.manual_seed(seed)
        return load_pretrained(model, init, spec, mean=mean, std=std)

    dense = load({})
    print(f"dtpvit: {dense.transfer.summary}")
    for row in asked:
        _check(row, dense)
    known = get_pretrained_cfg(model)
    crop = crop_pct or (1.0 if known is None or dense.is_clip else known.crop_pct)
    pixels, labels = _images(images, dense, limit, crop)
    apart = fit not in (None, "halves")
    fitted = real_images(str(fit), limit, _transform(dense, crop), least=1)[0] if apart else fit
    about = {"model": model, "init": init, "images": images, "count": len(pixels), "crop_pct": crop, "fit": fit}
    about |= {"batch_size": batch_size, "rounds": rounds, "seed": seed, "machine": machine(place)}
    about |= {"mean": dense.mean, "std": dense.std, "weights": _stamp(init), "versions": versions()}
    about |= {"pixels": content_digest(pixels, labels, fitted if isinstance(fitted, Tensor) else None)}
    kept = KeptRows(folder / "rows", about)
    count, changes = kept.changes(asked)
    if count:
        print(f"dtpvit: {count} rows of an earlier run are computed anew, other than then: {', '.join(changes)}")
    work = _Comparison(dense, pixels, labels, fitted, batch_size, rounds, seed, place)
    results = list[ComparedResult]()
    for row in (bar := tqdm(asked, unit="row", leave=False, disable=None)):
        bar.set_description(row.name)
        results.append(kept.result(row, lambda row=row: work(row, load(row.reducers))))
    _report(results, {**about, "date": date.today().isoformat()}, folder, len(pixels))


def _check(row: ComparedRow, dense: Pretrained) -> None:
    """Find out now what would not build, and say what is shown untrained."""
    trunk, learned = dense.trunk, set[str]()
    for block, maker in reducer_makers(row.reducers).items():
        try:
            reducer = maker(trunk.dim)
        except (TypeError, ValueError) as error:
            raise UserError(f"the row {row.name!r} does not build: {error}") from error
        if isinstance(trunk, VisionEncoder) and block >= trunk.depth:
            raise UserError(f"the row {row.name!r} has a reducer at block {block} of {trunk.depth}, counted from 0")
        assert isinstance(reducer, TokenReducer)
        learned |= {name for name, _ in reducer.named_parameters() if not name.endswith("boundary_sensitivity")}
    if learned:
        print(f"dtpvit: {row.name} has parts that training would change; it is shown as it starts")


def _stamp(init: str | None) -> list[int] | None:
    """What tells one file of weights from another of that name."""
    path = Path(init or "")
    return [path.stat().st_size, path.stat().st_mtime_ns] if init and path.is_file() else None


def _transform(model: Pretrained, crop: float) -> Any:
    height, width = model.trunk.image_size
    return eval_transform((height, width), crop_pct=crop)


def _images(source: str, model: Pretrained, limit: int, crop: float) -> tuple[Tensor, Tensor | None]:
    """uint8 images, shape (N, 3, H, W), and their labels, shape (N,), or None for a model without classes."""
    if not model.num_classes:
        return real_images(source, limit, _transform(model, crop), least=1)[0], None
    index = index_labelled(source, limit=limit)
    if index.num_classes != model.num_classes:
        raise UserError(
            f"{source} has {index.num_classes} classes, the model {model.num_classes}; give images of its own"
        )
    height, width = model.trunk.image_size
    loader = LabelledLoader(index, image_size=(height, width), crop_pct=crop, batch_size=50, num_workers=0)
    batches = list(tqdm(loader, desc="reading images", leave=False, disable=None))
    if not batches:
        raise UserError(f"none of the {len(index.samples)} images of {source} can be read")
    if loader.skipped:
        print(f"dtpvit: {loader.skipped} images cannot be read and are left out, the first {loader.broken[:1]}")
    return torch.cat([batch["image"] for batch in batches]), torch.cat([batch["label"] for batch in batches])


@dataclass
class _Comparison:
    """What the rows have in common."""

    dense: Pretrained
    images: Tensor
    labels: Tensor | None
    fitted: Tensor | str | None
    batch_size: int
    rounds: int
    seed: int
    device: torch.device
    reference: Answers | None = None

    def __call__(self, row: ComparedRow, candidate: Pretrained) -> ComparedResult:
        found = self._answers(candidate)
        if self.reference is None:
            self.reference = self._answers(self.dense) if row.reducers else found
        against = outcome(found, self.reference, classes=self.labels is not None, labels=self.labels)
        speed, ratio = self._speed(candidate)
        return ComparedResult(
            series=row.series,
            setting=row.setting,
            top1=against.top1,
            agreement=against.agreement,
            divergence=against.far,
            gmacs=against.gmacs,
            tokens=against.tokens,
            decision=found.decision.mean().item() / 1e9,
            images_per_second=speed,
            speed_up=ratio,
            efficiency=None if ratio is None else ratio * against.gmacs / (self.reference.macs.mean().item() / 1e9),
            **self._accuracy(found, self.reference),
        )

    def _answers(self, candidate: Pretrained) -> Answers:
        options: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device, "seed": self.seed}
        if self.fitted is not None and has_to_fit(candidate):
            if self.fitted == "halves":
                return cross_fitted_answers(candidate, self.images, **options)
            assert isinstance(self.fitted, Tensor)
            fit_reducers(candidate, self.fitted, **options)
        return answers(candidate, self.images.split(self.batch_size), self.device)

    def _accuracy(self, found: Answers, dense: Answers) -> dict[str, float | None]:
        if self.labels is None:
            return {"top5": None, "change": None, "error": None}
        five = found.outputs.topk(min(5, found.outputs.shape[1]), dim=1).indices
        right = [(answer.outputs.argmax(1) == self.labels).double() for answer in (found, dense)]
        change = right[0] - right[1]
        error = (change.var() / len(change)).sqrt() if len(change) > 1 else torch.zeros(())
        top5 = (five == self.labels[:, None]).any(1).double().mean()
        return {"top5": top5.item(), "change": change.mean().item(), "error": error.item()}

    def _speed(self, candidate: Pretrained) -> tuple[float | None, float | None]:
        """Images/s, and the speed-up over the dense model."""
        if not self.rounds:
            return None, None
        batch, models = self.images[: self.batch_size], {"dense": self.dense, "row": candidate}
        seconds = forward_seconds(models, batch, self.device, rounds=self.rounds, warmup=1)
        return len(batch) / median(seconds["row"]), speed_ups(seconds, "dense")["row"].median


def _report(results: Sequence[ComparedResult], about: dict[str, Any], folder: Path, count: int) -> None:
    Console(width=None if sys.stdout.isatty() else 200).print(shown(results))  # in a log no row is folded
    write(results, {"command": shlex.join(["dtpvit", *sys.argv[1:]]), **about}, folder)
    pictures = [folder / "comparison.png", folder / "comparison.svg"]
    try:
        draw(results, pictures)
        wrote = "comparison.md, .csv, .json, .png and .svg"
    except ImportError:
        wrote = "comparison.md, .csv and .json; for the picture too, pip install dtpvit[plot]"
    print(f"\n{count} images, {about['machine']}, fp32. ± is one standard error over images in pairs.")
    print(f"dtpvit: wrote {folder}: {wrote}")
