"""What is in shards, sample by sample, judged as training judges it, by several processes at once."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

from tqdm import tqdm

from dtpvit.datamodules.samples import SkippedSample, captions_of, decode_image, raw_sample
from dtpvit.datamodules.tars import Fault, scan_shard
from dtpvit.datamodules.worker_signals import end_with_parent
from dtpvit.errors import UserError

__all__ = ["LOST", "OF_SAMPLES", "ShardSurvey", "default_workers", "survey_shard", "survey_shards"]

OF_SAMPLES = ("no image", "no caption", "broken image", "oversized image")
"""The causes that each stand for one sample that training does not use."""
LOST = "in _stats.json, not in the shard"

Keep = Callable[[str, dict[str, bytes]], None]


@dataclass
class ShardSurvey:
    """What one shard holds.

    Attributes:
        shard: Its path or address.
        keys: Of all samples, usable or not, each once.
        usable: Samples that training would use.
        faults: What is wrong, one entry a key and cause; "caption not UTF-8" alone leaves its sample usable.
        sizes: How many usable images have this width and height, upright; empty if nothing was decoded.
        lengths: How many captions have this many characters.
    """

    shard: str
    keys: list[str] = field(default_factory=list)
    usable: int = 0
    faults: list[Fault] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)


def survey_shard(shard: str, *, decode: bool = True, keep: Keep | None = None) -> ShardSurvey:
    """Read one shard.

    Args:
        shard: Path or address.
        decode: Decode every image; otherwise an image is what has an image's ending and is not empty.
        keep: Given key and members of each usable sample, a caption that is not UTF-8 as training reads it.
    """
    survey, faults = ShardSurvey(shard), dict[Fault, None]()
    for found in scan_shard(shard):
        if isinstance(found, Fault):
            faults[found] = None
            continue
        key, parts = found
        survey.keys.append(key)
        try:
            size, captions = _judge(key, parts, decode)
        except SkippedSample as skipped:
            faults[Fault(skipped.cause, key)] = None
            continue
        survey.usable += 1
        survey.lengths.update(len(caption.strip()) for caption in captions)
        if size is not None:
            survey.sizes[size] += 1
        readable = parts.get("txt", b"").decode("utf-8", "replace").encode()
        if readable != parts.get("txt", b""):
            faults[Fault("caption not UTF-8", key)] = None
            parts["txt"] = readable
        if keep is not None:
            keep(key, parts)
    survey.faults = list(faults)
    return survey


def survey_shards(
    shards: Sequence[str], survey: Callable[[str], ShardSurvey], workers: int | None
) -> Iterator[ShardSurvey]:
    """Surveys of the shards in their order, with a progress bar.

    Args:
        shards: As ``named_shards`` gives them.
        survey: ``survey_shard`` or a partial of it; it travels to the processes.
        workers: Processes, one for each core if None; 1 works in this process.

    Raises:
        UserError: If ``workers`` is below 1, or a process is killed.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers is {workers}; give at least 1 process.")
    bar = partial(tqdm, total=len(shards), desc="reading shards", unit="shard", leave=False, disable=None)
    if workers == 1 or len(shards) == 1:
        yield from bar(map(survey, shards))
        return
    context = get_context("forkserver")  # forked from a process without threads, torch already imported
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(workers, len(shards)), context, initializer=_begin)
    try:
        yield from bar(pool.map(survey, shards))
    except BrokenProcessPool:
        raise UserError(
            "One of the processes that read shards was killed, probably for want of memory; give fewer --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _judge(key: str, parts: dict[str, bytes], decode: bool) -> tuple[tuple[int, int] | None, list[str]]:
    """Width and height, if decoded, and captions; a sample with a ``.cls`` is labelled and needs no caption."""
    labelled = "cls" in parts
    raw = raw_sample(key, parts | {"txt": parts["cls"]} if labelled else parts)
    captions = [] if labelled else captions_of(raw)
    return decode_image(raw.image).size if decode else None, captions


def _begin() -> None:
    """PIL's remarks on metadata would break the progress bar; what cannot be used is counted."""
    warnings.simplefilter("ignore")
    end_with_parent()
