"""Images per second and core, from shards to batches: dtpvit's loader beside open_clip's on the same shards.

    python -m benchmarks.loading --data SHARDS --markdown

Both run in this process by turns, so that whatever else the machine does falls on both alike. Rates are of CPU time
(all threads of the process) unless they say wall; medians over the rounds, with the least and the most.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before torch starts its pools: "per core" means one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from benchmarks.enlarged import enlarge
from benchmarks.loading_paths import STAGES, Lane, OpenClip, Ours
from dtpvit.datamodules.shards import count_samples, expand_shards

PACKAGES = ("torch", "torchvision", "pillow", "open_clip_torch", "webdataset")
Numbers = list[float]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return the results: {"machine": ..., "rates": ..., "stages": ..., "bytes": ...}."""
    options = _options(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = expand_shards(options.data)
        if options.enlarge:
            shards = enlarge(shards, Path(folder), *options.enlarge, options.samples)
        results = _measure(shards, options)
    print(_markdown(results) if options.markdown else _sentence(results))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return results


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder, brace list or glob of image-text shards")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="if not 0: also the whole way with N processes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=500, help="images for the stages, and to enlarge")
    parser.add_argument(
        "--enlarge",
        type=int,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="first upscale the images to a short side drawn from these, JPEG quality 95",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of one sentence")
    return parser.parse_args(argv)


def _measure(shards: list[str], options: argparse.Namespace) -> dict[str, Any]:
    number = count_samples(shards)
    if number is None or number < options.batch_size:
        raise SystemExit(f"The shards hold {number} samples (None: no _stats.json); at least one batch is needed.")
    lanes: list[Lane] = [
        Ours(shards, options.image_size, options.batch_size),
        OpenClip(shards, options.image_size, options.batch_size, number),
    ]
    rates: dict[str, dict[str, Numbers]] = {}
    stages: dict[str, dict[str, Numbers]] = {}
    samples = min(number, options.samples)
    transforms = [lane.transform(samples) for lane in lanes]
    widths = [_bytes_per_image(lane) for lane in lanes]  # and both are warm
    for _ in range(options.rounds):
        for lane, transform in zip(lanes, transforms, strict=True):
            cpu, wall, _ = _timed(transform)
            _note(rates, "decode and transform, from memory", lane, samples / cpu)
            cpu, wall, images = _timed(lambda lane=lane: sum(len(batch) for batch in lane.batches(0)))
            _note(rates, "shards to batches", lane, images / cpu)
            _note(rates, "shards to batches, wall", lane, images / wall)
            for stage, work in lane.stages(samples).items():
                _note(stages, stage, lane, 1e3 * _timed(work)[0] / samples)
            if options.workers:
                _, wall, images = _timed(lambda lane=lane: sum(len(b) for b in lane.batches(options.workers)))
                _note(rates, f"shards to batches, wall, {options.workers} workers", lane, images / wall)
    names = [lane.name for lane in lanes]
    return {
        "machine": _machine(),
        "images": number,
        "rates": rates,
        "stages": stages,
        "bytes": dict(zip(names, widths, strict=True)),
    }


def _timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, wall seconds, and what ``work`` returns."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def _note(table: dict[str, dict[str, Numbers]], row: str, lane: Lane, value: float) -> None:
    table.setdefault(row, {}).setdefault(lane.name, []).append(value)


def _bytes_per_image(lane: Lane) -> int:
    batch = next(iter(lane.batches(0)))
    return batch[0].numel() * batch.element_size()


def _machine() -> str:
    model = platform.processor() or "unknown processor"
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"one of {os.cpu_count()} cores, {model}; Python {platform.python_version()}, {packages}"


def _ratios(row: dict[str, Numbers]) -> Numbers:
    """Ours by open_clip's, round by round."""
    return [ours / other for ours, other in zip(row[Ours.name], row[OpenClip.name], strict=True)]


def _sentence(results: dict[str, Any]) -> str:
    row = results["rates"]["shards to batches"]
    ours, other = (statistics.median(row[name]) for name in (Ours.name, OpenClip.name))
    return f"{ours:.0f} images/s per core, open_clip {other:.0f}: {statistics.median(_ratios(row)):.2f} times as many"


def _markdown(results: dict[str, Any]) -> str:
    lines = [f"{results['images']} images; {results['machine']}.", ""]
    lines += ["| images/s | dtpvit | open_clip | ratio |", "|---|---|---|---|"]
    for name, row in results["rates"].items():
        cells = [_spread(row[lane], "{:.0f}") for lane in (Ours.name, OpenClip.name)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {_spread(_ratios(row), '{:.2f}')} |")
    lines += ["", "| ms an image | dtpvit | open_clip |", "|---|---|---|"]
    for stage in STAGES:
        cells = [_spread(results["stages"][stage][lane], "{:.3f}") for lane in (Ours.name, OpenClip.name)]
        lines.append(f"| {stage} | {cells[0]} | {cells[1]} |")
    ours, other = results["bytes"][Ours.name], results["bytes"][OpenClip.name]
    lines += ["", f"Bytes to the device an image: {ours:,} (uint8), open_clip {other:,} (float32)."]
    return "\n".join(lines)


def _spread(values: Numbers, form: str) -> str:
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
