"""Finding labelled images: class folders, flat folders of ImageNet files, and webdataset shards.

Everything that can be wrong with a data set is found here, before the first image is decoded; from here on
an image is an address (file, offset, size) and a label, whatever it is stored in.
"""

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

from tqdm import tqdm

from dtpvit.datamodules.labelled_shards import IMAGES, Sample, index_tar, labelled_shards, names_beside
from dtpvit.datamodules.prompts import load_classnames
from dtpvit.errors import UserError

__all__ = ["LabelledIndex", "Sample", "index_labelled", "plain_name"]

_WNID = re.compile(r"(?:^|_)(n\d{8})(?=_|$)")
_SPLITS = ("train", "training", "val", "valid", "validation", "test")
_KINDS = ("auto", "imagenet", "v2", "a", "r", "sketch", "folders")


@dataclass(frozen=True)
class LabelledIndex:
    """A labelled data set, found and checked, with nothing decoded yet.

    Attributes:
        samples: Every image and its label, in a fixed order.
        classnames: One name a class, in label order; None stands for the 1,000 ImageNet classes.
        class_indices: The labels that may occur, if by convention fewer than all (ImageNet-A and -R have
            200 classes of the 1,000): a classifier is to be cut down to these columns.
        incomplete: Shard samples without an image or without a label, left out of ``samples``.
    """

    samples: list[Sample]
    classnames: list[str] | None = None
    class_indices: list[int] | None = None
    incomplete: int = 0

    @property
    def num_classes(self) -> int:
        """Classes that labels count through: 1,000 for ImageNet and its offspring."""
        return 1000 if self.classnames is None else len(self.classnames)


def index_labelled(
    data: str, *, classnames: list[str] | None = None, labels: str = "auto", limit: int | None = None
) -> LabelledIndex:
    """Find the images of a data set and their labels.

    Args:
        data: A folder of class folders, a flat folder of images with a wnid in their names, a folder of
            webdataset shards (clip-benchmark's ``test/0.tar`` too), or shards as a brace list or a glob.
        classnames: Names in label order. Class folders are matched to them; case, ``_`` and ``-`` do not
            count.
        labels: What the labels mean: "imagenet" and "sketch" (1,000 wnids), "a" and "r" (200 of these), "v2"
            (folders 0 to 999), "folders" (sorted folders, or in the order of ``classnames``); "auto" looks.
        limit: Keep this many images, evenly spaced over the data set so that classes keep their shares.

    Raises:
        UserError: No images, folders that do not fit the classes, labels without classes, broken shards.
    """
    if labels not in _KINDS:
        raise UserError(f"labels is {labels!r}: choose one of {', '.join(_KINDS)}.")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give a number of images of at least 1, or leave it out.")
    root = Path(data).expanduser()
    if shards := labelled_shards(data):
        index = _index_shards(data, shards, classnames, labels)
    else:
        index = _index_folder(root, classnames, labels)
    if index.classnames is None and classnames is not None:
        if len(classnames) != 1000:
            raise UserError(
                f"{data} has ImageNet's labels but {len(classnames)} class names came with it: "
                "give 1000 names, or none."
            )
        index = replace(index, classnames=list(classnames))
    count = len(index.samples)
    if limit is not None and limit < count:
        index = replace(index, samples=[index.samples[i * count // limit] for i in range(limit)])
    return index


# Class folders and flat folders


def _index_folder(root: Path, classnames: list[str] | None, labels: str) -> LabelledIndex:
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        return _index_flat(root, [entry.name for entry in entries if _is_image(entry.name)], labels)
    files = {name: sorted(filter(_is_image, os.listdir(root / name))) for name in folders}
    if empty := [name for name in folders if not files[name]]:
        if splits := [name for name in empty if name.lower() in _SPLITS]:
            raise UserError(
                f"{root} holds the split{'s' * (len(splits) > 1)} {', '.join(splits)} where class folders were "
                f"expected: give one split, such as {root / splits[0]}."
            )
        raise UserError(
            f"{root} has {len(empty)} of {len(folders)} folders without images, such as {empty[0]}: give the "
            "folder that holds the class folders of one split, completely unpacked."
        )
    label_of, index = _label_folders(root, folders, classnames, labels)
    samples = [Sample(str(root / name / file), label_of[name]) for name in folders for file in files[name]]
    return replace(index, samples=samples)


def _label_folders(
    root: Path, folders: list[str], classnames: list[str] | None, labels: str
) -> tuple[dict[str, int], LabelledIndex]:
    """The label of each class folder, and an index still without samples."""
    if labels == "auto":
        labels = _guess(root, folders, classnames)
    if labels == "folders":
        label_of, names = _own_labels(root, folders, classnames)
        return label_of, LabelledIndex([], classnames=names)
    expected = {str(i): i for i in range(1000)} if labels == "v2" else _wnid_labels(labels)
    missing, unknown = sorted(expected.keys() - set(folders)), sorted(set(folders) - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{root} holds {len(folders) - len(unknown)} of the {len(expected)} class folders of "
            f"labels={labels}"
            + (f", without {missing[0]}" if missing else "")
            + (f", and {len(unknown)} that are not among them, such as {unknown[0]}" if unknown else "")
            + ": unpack the whole data set, or pass labels=folders to number the folders that are there."
        )
    return expected, LabelledIndex([], class_indices=_restriction(labels))


def _guess(root: Path, folders: list[str], classnames: list[str] | None) -> str:
    if classnames is not None and {plain_name(name) for name in classnames} == {plain_name(name) for name in folders}:
        return "folders"
    if all(_WNID.fullmatch(name) for name in folders):
        for kind in ("a", "r"):
            if set(folders) == _wnid_labels(kind).keys():
                return kind
        return "imagenet"
    if all(name.isdecimal() for name in folders):
        if len(folders) == 1000:
            return "v2"
        if classnames is None:
            raise UserError(
                f"{root} holds {len(folders)} numbered folders where ImageNet-V2 has 1000 (0 to 999): "
                "complete it, give class names, or pass labels=folders."
            )
    return "folders"


def _own_labels(root: Path, folders: list[str], classnames: list[str] | None) -> tuple[dict[str, int], list[str]]:
    """Labels of a data set with classes of its own, and the name of each class."""
    numbered = sorted(folders, key=lambda name: int(name) if name.isdecimal() else -1)
    is_count = numbered == [str(i) for i in range(len(folders))]
    if classnames is None:
        ordered = numbered if is_count else folders
        return {name: label for label, name in enumerate(ordered)}, [_readable(name) for name in ordered]
    plain = [plain_name(name) for name in classnames]
    by_name = {name: label for label, name in enumerate(plain)}
    found = {plain_name(name) for name in folders}
    if len(by_name) == len(plain) and found == by_name.keys() and len(found) == len(folders):
        return {name: by_name[plain_name(name)] for name in folders}, list(classnames)
    if is_count and len(classnames) == len(folders):
        return {name: int(name) for name in folders}, list(classnames)
    if len(by_name) < len(plain):
        twice = next(name for name in plain if plain.count(name) > 1)
        raise UserError(f"The class name {twice!r} occurs twice, so that folders cannot be told apart: rename one.")
    stray, absent = sorted(found - by_name.keys()), sorted(by_name.keys() - found)
    raise UserError(
        f"{root} has {len(folders)} class folders for {len(classnames)} class names"
        + (f", with no folder for {absent[0]!r}" if absent else "")
        + (f", with no class name for the folder {stray[0]!r}" if stray else "")
        + ": give exactly one name for each folder."
    )


def _index_flat(root: Path, files: list[str], labels: str) -> LabelledIndex:
    if not files:
        raise UserError(
            f"{root} holds no class folders, no {', '.join(IMAGES)} images and no .tar shards: give the "
            "folder of one split of a labelled data set."
        )
    label_of = {} if labels in ("folders", "v2") else _wnid_labels(labels)
    samples = []
    for name in files:
        match = _WNID.search(Path(name).stem)
        if match is None or match[1] not in label_of:
            raise UserError(
                f"{root} holds {len(files)} images in no class folder, and the name of {name} gives no label "
                f"for labels={labels}: sort them into one folder a class, or name them <wnid>_<any>.JPEG."
            )
        samples.append(Sample(str(root / name), label_of[match[1]]))
    return LabelledIndex(samples, class_indices=_restriction(labels))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES) and not name.startswith(".")


def plain_name(name: str) -> str:
    """A class name as it is compared: case, ``_`` and ``-`` do not count."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _readable(folder: str) -> str:
    label = _wnid_labels("imagenet").get(folder) if _WNID.fullmatch(folder) else None
    return folder.replace("_", " ") if label is None else load_classnames(None)[label]


@cache
def _wnid_labels(kind: str) -> dict[str, int]:
    """ImageNet-1k label of each wnid of ImageNet-A ("a"), ImageNet-R ("r"), or of all 1,000 (any other)."""
    synsets = resources.files("timm.data") / "_info"
    label_of = {wnid: i for i, wnid in enumerate((synsets / "imagenet_synsets.txt").read_text().split())}
    if kind in ("a", "r"):
        chosen = (synsets / f"imagenet_{kind}_synsets.txt").read_text().split()
        return {wnid: label_of[wnid] for wnid in chosen}
    return label_of


def _restriction(labels: str) -> list[int] | None:
    return sorted(_wnid_labels(labels).values()) if labels in ("a", "r") else None


# Shards


def _index_shards(data: str, shards: list[str], classnames: list[str] | None, labels: str) -> LabelledIndex:
    samples: list[Sample] = []
    incomplete = 0
    for shard in tqdm(shards, desc="reading labels", unit="shard", delay=5, disable=None, leave=False):
        found, left_out = index_tar(shard)
        samples += found
        incomplete += left_out
    if not samples:
        raise UserError(
            f"{data} has no sample with both an image (jpg, png, webp) and a .cls label among {incomplete}: "
            "give shards of a labelled data set, or unpack the tar if it holds class folders."
        )
    if classnames is None and labels == "auto":
        classnames = names_beside(shards[0])
    present = {sample.label for sample in samples}
    if classnames is None and labels in ("auto", "folders") and present != set(range(1000)):
        raise UserError(
            f"{data} has {len(present)} labels from {min(present)} to {max(present)} and no classnames.txt "
            "beside it: give the class names, or pass labels=imagenet if these are ImageNet's."
        )
    allowed = _restriction(labels) or range(1000 if classnames is None else len(classnames))
    if strange := present.difference(allowed):
        raise UserError(
            f"{data} has the label {min(strange)}, which is none of its {len(allowed)} classes: give the "
            "class names, or the labels=, that belong to these shards."
        )
    return LabelledIndex(samples, classnames, _restriction(labels), incomplete)
