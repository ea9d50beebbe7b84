"""What a classifier is trained on, found and checked against its validation data and the model's head."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path, PurePath

from tqdm import tqdm

from dtpvit.datamodules.labelled_index import LabelledIndex, index_labelled, plain_name
from dtpvit.datamodules.labelled_recipe import check_label
from dtpvit.datamodules.labelled_shards import Sample, index_tar, labelled_shards, names_beside
from dtpvit.datamodules.samples import sample_seed
from dtpvit.datamodules.shards import count_samples, is_local
from dtpvit.errors import UserError

__all__ = ["TrainingImages", "check_head", "check_same_classes", "check_shards", "find_training_images"]


@dataclass(frozen=True)
class TrainingImages:
    """Files with their labels, or shards whose labels come with their samples.

    Attributes:
        data: As the user named it.
        files: Every image; [] for shards.
        shards: [] for files.
        classnames: In label order; None for the 1,000 ImageNet classes, and for shards that do not tell.
        num_classes: None for shards that do not tell.
        num_samples: Images, or samples per epoch; None if it is not known.
    """

    data: str
    files: list[Sample]
    shards: list[str]
    classnames: list[str] | None
    num_classes: int | None
    num_samples: int | None


def find_training_images(
    data: str,
    *,
    classnames: list[str] | None = None,
    labels: str = "auto",
    limit: int | None = None,
    num_samples: int | None = None,
) -> TrainingImages:
    """Find the training images, opening none.

    Args:
        data, classnames, labels: As of ``index_labelled``; shards may be compressed or of another machine too.
        limit: Keep this many images, as evenly over the classes as these allow. Which ones depends on nothing but
            their names, and a larger limit keeps these too. Folders only.
        num_samples: Samples per epoch. Shards only; None takes the sum of their ``_stats.json``.

    Raises:
        UserError: As ``index_labelled``, and if an option is not for this kind of data.
    """
    shards = labelled_shards(data, foreign=True)
    if not shards:
        if num_samples is not None:
            raise UserError(f"num_samples is {num_samples}, but {data} is a folder of images: use limit_train.")
        index = index_labelled(data, classnames=classnames, labels=labels)
        files = index.samples if limit is None else _evenly(index.samples, limit)
        return TrainingImages(data, files, [], index.classnames, index.num_classes, len(files))
    if limit is not None:
        raise UserError(f"limit_train is {limit}, but {data} is shards: name fewer shards, or give a folder of images.")
    folder = Path(data).expanduser()
    if folder.is_dir() and Path(shards[0]).parent != folder:
        raise UserError(
            f"{data} holds no training shards, only those in {Path(shards[0]).parent}: name the folder to train on."
        )
    if labels not in ("auto", "imagenet", "folders"):
        raise UserError(f"labels is {labels!r}, but training shards have 'auto', 'imagenet' or 'folders': use one.")
    if classnames is None and labels == "auto" and is_local(shards[0]):
        classnames = names_beside(shards[0])
    num_classes = 1000 if labels == "imagenet" else len(classnames) if classnames is not None else None
    count = count_samples(shards) if num_samples is None else num_samples
    return TrainingImages(data, [], shards, classnames, num_classes, count)


def check_shards(training: TrainingImages, num_classes: int) -> TrainingImages:
    """Check that the labels in shards are below ``num_classes``, and count the samples if nothing tells their number.

    Where the number is known only the first shard is read, for to read a large data set takes as long as an epoch;
    the other labels are checked as they come. Files are as they were: finding them has checked them.

    Raises:
        UserError: If a label is none of the classes, or there are none.
    """
    local = [shard for shard in training.shards if is_local(shard) and shard.endswith(".tar")]
    known = training.num_samples is not None or len(local) < len(training.shards)
    found = 0
    wanted = local[:1] if known else local
    for shard in tqdm(wanted, desc="reading labels", unit="shard", delay=5, disable=None, leave=False):
        samples, incomplete = index_tar(shard)
        for sample in samples:
            check_label(sample.label, shard, num_classes)
        if not samples:
            raise UserError(
                f"{shard} has no sample with both an image (jpg, png, webp) and a .cls label among {incomplete}: "
                "give shards of labelled images, or unpack the tar if it holds class folders."
            )
        found += len(samples)
    return training if known or not training.shards else replace(training, num_samples=found)


def check_same_classes(training: TrainingImages, val: LabelledIndex, val_data: str) -> None:
    """Refuse validation data with other classes, or in another order, where both are known.

    Raises:
        UserError: Naming a class that makes the difference.
    """
    mine, theirs = training.classnames, val.classnames
    if mine is not None and theirs is not None:
        here, there = [plain_name(name) for name in mine], [plain_name(name) for name in theirs]
        if here == there:
            return
        if sorted(here) == sorted(there):
            label = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
            raise UserError(
                f"Label {label} is {mine[label]!r} in {training.data} and {theirs[label]!r} in {val_data}: give both "
                "the same class names in one order."
            )
        lacking, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
        raise UserError(
            f"{val_data} has {len(theirs)} classes where {training.data} has {len(mine)}"
            + (f", without {lacking[0]!r}" if lacking else "")
            + (f", and with {extra[0]!r}, which is not trained on" if extra else "")
            + ": give validation images of the same classes."
        )
    if training.num_classes not in (None, val.num_classes):
        raise UserError(
            f"{val_data} has {val.num_classes} classes where {training.data} has {training.num_classes}: "
            "give validation images of the same classes."
        )


def check_head(data: str, num_classes: int, classnames: Sequence[str] | None, head: int) -> None:
    """Refuse a model whose head has another number of classes than the data.

    Raises:
        UserError: Saying both numbers.
    """
    if num_classes == head:
        return
    named = f" ({classnames[0]} to {classnames[-1]})" if classnames else ""
    raise UserError(
        f"{data} has {num_classes} classes{named} where the model's head has {head}: "
        f"set num_classes to {num_classes}, or give the data that this head is for."
    )


def _evenly(samples: list[Sample], limit: int) -> list[Sample]:
    """The first ``limit`` images, dealt out class by class, of an order that their names decide."""
    by_class: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, sample in enumerate(samples):
        key = "/".join(PurePath(sample.path).parts[-2:])
        by_class[sample.label].append((sample_seed(key, 0, 0), place))
    if limit < len(by_class):
        raise UserError(f"limit_train is {limit} for {len(by_class)} classes: keep at least one image of each.")
    rounds = zip_longest(*(sorted(places) for places in by_class.values()))
    dealt = [item[1] for item in chain.from_iterable(rounds) if item is not None]
    return [samples[place] for place in sorted(dealt[:limit])]
