"""Data sets that ``dtpvit data get`` cannot fetch: what of them is here, and where the rest is had."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dtpvit.datamodules.conversations import read_conversations
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.errors import UserError

__all__ = ["check_imagenet", "check_llava"]


def check_imagenet(folder: Path) -> None:
    """Say what of ImageNet is there, in the layout that evaluation and training read.

    Raises:
        UserError: If images are missing.
    """
    for split, expected in (("train", 1_281_167), ("val", 50_000)):
        path = folder / split
        if not path.is_dir():
            raise UserError(
                f"{path} does not exist: ImageNet is had only from https://image-net.org, on its terms; arrange it as "
                f"{path}/n01440764/NAME.JPEG, as data/imagenet/README.md shows."
            )
        index = index_labelled(str(path), labels="imagenet")
        found = len(index.samples)
        print(f"{path}: {found:,} images of {len({sample.label for sample in index.samples}):,} classes.")
        if found != expected:
            raise UserError(
                f"{path} holds {found:,} images where ImageNet-1k has {expected:,}: unpack the archive again."
            )


def check_llava(folder: Path) -> None:
    """Say how many records of LLaVA-1.5's two stages can be used, and whose images are missing.

    Raises:
        UserError: If a file is missing, or records cannot be used.
    """
    for name, images in (
        ("pretrain/blip_laion_cc_sbu_558k.json", "pretrain/images"),
        ("finetune/llava_v1_5_mix665k.json", "finetune/images"),
    ):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} does not exist: data/llava/README.md says where it and its images are had.")
        found = read_conversations(str(path), str(folder / images))
        causes = Counter(
            f"{skipped.cause}, {Path(skipped.detail).parent}" if skipped.cause == "missing image" else skipped.cause
            for skipped in found.skipped
        )
        total = len(found) + len(found.skipped)
        print(f"{path}: {len(found):,} of {total:,} records can be used.")
        if causes:
            listed = "; ".join(f"{cause}: {number:,}" for cause, number in causes.most_common())
            raise UserError(
                f"{len(found.skipped):,} records of {path} cannot be used ({listed}): see data/llava/README.md"
            )
