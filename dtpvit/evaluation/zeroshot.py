"""Zero-shot classification: how often an encoder is right, what it keeps of an image, and what that costs."""

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from dtpvit import __version__
from dtpvit.datamodules.labelled import LabelledLoader, check_batching
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.datamodules.prompts import load_classnames, load_templates
from dtpvit.errors import UserError
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.classifier import Precision, build_classifier
from dtpvit.evaluation.measure import ZeroShotResult, evaluate
from dtpvit.output_file import output_file, write_json

__all__ = ["ZeroShotResult", "build_classifier", "evaluate", "zeroshot"]


def zeroshot(
    data: str,
    model: str | None = None,
    checkpoint: str | None = None,
    templates: str = "openai",
    classnames: str | None = None,
    labels: Literal["auto", "imagenet", "v2", "a", "r", "sketch", "folders"] = "auto",
    batch_size: int = 64,
    workers: int = 2,
    precision: Precision = "fp32",
    device: str = "auto",
    limit: int | None = None,
    output: str | None = None,
    per_class: bool = False,
) -> None:
    """Classify labelled images by the names of their classes; print the result and write it as JSON.

    Args:
        data: Class folders, a flat folder of <wnid>.jpg, or webdataset shards with jpg|png|webp + cls.
        model: Name of a model, ours or open_clip's; a checkpoint or a folder of ours says it itself.
        checkpoint: Our checkpoint, an exported folder, or weights or pretrained tag of an open_clip model.
        templates: openai (80 prompts a class), simple (7), none, or a file, one prompt a line with {c} in it.
        classnames: File with one class name a line, in label order.
        labels: What the labels mean: ImageNet's classes (imagenet, v2, a, r, sketch), or folders in order.
        batch_size: Images at a time; the result does not depend on it.
        workers: Processes that decode images.
        precision: Of both towers.
        device: auto, cpu, cuda, cuda:1, ...
        limit: Evaluate this many images only, spread evenly over the data set.
        output: JSON file for the result, with CLIP_benchmark's keys and ours.
        per_class: Put every class's recall into the JSON file.
    """
    # What the user can have mistaken comes first: loading the weights takes longest.
    model, checkpoint = _weights(model, checkpoint)
    check_batching(batch_size, workers)
    place, target = chosen_device(device), output_file(output)
    prompts = load_templates(templates)
    own_names = None if classnames is None else load_classnames(classnames)
    index = index_labelled(data, classnames=own_names, labels=labels, limit=limit)
    names = load_classnames(index.classnames)

    from dtpvit.interop.loading import load_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a model without a checkpoint has the same random weights in every run
        loaded = load_clip(model=model, checkpoint=checkpoint)
    loader = LabelledLoader(
        index,
        image_size=loaded.image_size,
        batch_size=batch_size,
        num_workers=workers,
        resize_mode=loaded.resize_mode,
    )
    encoder = loaded.model.to(place)
    columns = index.class_indices or list(range(len(names)))
    chosen = [names[column] for column in columns]
    part = build_classifier(encoder, loaded.tokenize, chosen, prompts, device=place, precision=precision, progress=True)
    classifier = part.new_zeros(len(part), len(names)).index_copy(1, torch.tensor(columns, device=place), part)
    result = evaluate(
        encoder,
        loader,
        classifier,
        device=place,
        mean=loaded.mean,
        std=loaded.std,
        precision=precision,
        progress=True,
    )
    is_random = checkpoint is None and ":" not in str(model)
    name = f"{loaded.name} with random weights: no checkpoint was given" if is_random else loaded.name
    print(_summary(result, name, checkpoint, data, f"{place.type}, {precision}, batch {batch_size}", loader.broken))
    if target is not None:
        settings = {"precision": precision, "device": str(place), "batch_size": batch_size}
        settings |= {"templates": templates, "labels": labels, "limit": limit}
        record = _record(result, loaded.name, data, checkpoint) | settings
        if per_class:
            record["per_class"] = _per_class(result, names)
        write_json(target, record)


def _weights(model: str | None, checkpoint: str | None) -> tuple[str | None, str | None]:
    """Model and checkpoint as ``load_clip`` wants them, the checkpoint found to exist."""
    if model is None and checkpoint is None:
        raise UserError("Neither a model nor a checkpoint was given: pass --checkpoint FILE or --model NAME.")
    if checkpoint is None:
        return model, None
    path = Path(checkpoint).expanduser()
    if path.is_dir() and model is None:
        return f"local-dir:{path}", None
    if path.is_file():
        return model, str(path)
    if model is not None:
        import open_clip

        if checkpoint in open_clip.list_pretrained_tags_by_model(model):
            return model, checkpoint
    raise UserError(
        f"The checkpoint {checkpoint} does not exist: give a file, a folder that `dtpvit export` wrote, or a "
        "pretrained tag of an open_clip model."
    )


def _summary(result: ZeroShotResult, name: str, weights: str | None, data: str, how: str, broken: list[str]) -> str:
    lines = [
        ("data", f"{data}: {result.n} images, {result.num_classes} classes"),
        ("model", name if weights is None else f"{name}, weights {weights}"),
        ("top-1", f"{result.acc1:7.2%}   (chance {1 / result.num_classes:.2%})"),
    ]
    if result.num_classes > 5:
        lines.append(("top-5", f"{result.acc5:7.2%}   (chance {5 / result.num_classes:.2%})"))
    lines.append(("mean per class", f"{result.mean_per_class_recall:7.2%}"))
    if result.tokens is not None:
        tokens = result.tokens
        lines.append(("tokens/image", f"{tokens.mean:6.1f} ± {tokens.std:.1f}   ({tokens.min} to {tokens.max})"))
    if result.gmacs_per_image is not None and result.gmacs_dense is not None:
        share = result.gmacs_per_image / result.gmacs_dense
        cost = f"{result.gmacs_per_image:6.3g}   ({share:.0%} of {result.gmacs_dense:.3g} dense)"
        lines.append(("GMACs/image", cost))
    lines.append(("images/s", f"{result.images_per_second:6.0f}   (encoder alone; {how})"))
    if result.skipped:
        some = f", such as {broken[0]}" if broken else ""
        lines.append(("skipped", f"{result.skipped} images that could not be read{some}"))
    if result.not_finite:
        lines.append(("overflowed", f"{result.not_finite} images, counted as wrong: use bf16 or fp32"))
    return "\n".join(f"{title:<16}{text}" for title, text in lines)


def _record(result: ZeroShotResult, name: str, data: str, checkpoint: str | None) -> dict[str, Any]:
    """CLIP_benchmark's keys, then ours."""
    metrics = {
        "acc1": result.acc1,
        "acc5": result.acc5,
        "mean_per_class_recall": result.mean_per_class_recall,
    }
    record: dict[str, Any] = {
        "dataset": _dataset_name(data),
        "model": name,
        "pretrained": checkpoint or "",
        "task": "zeroshot_classification",
        "metrics": metrics,
        "language": "en",
        "n": result.n,
        "num_classes": result.num_classes,
        "skipped": result.skipped,
        "not_finite": result.not_finite,
        "images_per_second": result.images_per_second,
    }
    if result.tokens is not None:
        record["tokens_per_image"] = asdict(result.tokens)
        record["gmacs_per_image"] = result.gmacs_per_image
        record["gmacs_dense"] = result.gmacs_dense
    weights = Path(name.removeprefix("local-dir:") if checkpoint is None else checkpoint)
    if weights.exists():  # not so for random weights and pretrained tags
        record["checkpoint_sha256"] = _sha256(weights)
    packages = {"torch": version("torch"), "open_clip": version("open_clip_torch")}
    record["versions"] = {"dtpvit": __version__, "python": platform.python_version()} | packages
    return record


def _per_class(result: ZeroShotResult, names: list[str]) -> list[dict[str, Any]]:
    """Recall of each class that has images; a list, since two classes may share a name."""
    rows = enumerate(zip(names, result.class_count, result.class_correct, strict=True))
    return [
        {"label": label, "name": name, "n": count, "recall": correct / count}
        for label, (name, count, correct) in rows
        if count
    ]


def _dataset_name(data: str) -> str:
    """The folder's name, with its parent's where it names only a split."""
    path = Path(data).expanduser().absolute()
    if path.suffix == ".tar":
        path = path.parent
    return f"{path.parent.name}/{path.name}" if path.name in ("train", "val", "test") else path.name


def _sha256(path: Path) -> str | dict[str, str]:
    """Of a file, or of each file of weights in an exported folder."""
    if path.is_dir():
        return {file.name: str(_sha256(file)) for file in sorted(path.glob("*.safetensors"))}
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
