"""Faults put into real shards, and what they cost: which are survived, how they are counted, what is lost.

    python -m benchmarks.bad_data --data data/flickr8k/shards --out docs/results/bad_data.md

Every tenth sample of a copy of the shards is spoilt, in ways that take turns; the last shard is cut off in its middle,
and shards of no bytes, of no samples, of zeros and of HTML are put beside it. Then the loader reads all once, with
worker processes, and each sample that it gives is known by its seed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks.record import heading, pages, table
from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.datamodules.samples import ImageText, decode_image, read_samples, sample_seed
from dtpvit.datamodules.shards import expand_shards
from dtpvit.interop.loading import Tokenize
from dtpvit.interop.preprocessing import eval_transform

Parts = dict[str, bytes]
Fault = Callable[[Parts], Parts]


def _image(make: Callable[[Image.Image], bytes]) -> Fault:
    return lambda parts: parts | {"jpg": make(decode_image(parts["jpg"]))}


def _save(form: str, mode: str = "RGB", **options: object) -> Callable[[Image.Image], bytes]:
    def make(image: Image.Image) -> bytes:
        stream = io.BytesIO()
        image.convert(mode).save(stream, form, **options)
        return stream.getvalue()

    return make


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _save("JPEG", exif=exif)(image)


def _huge(side: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def _json(**changes: object) -> Fault:
    return lambda parts: {"jpg": parts["jpg"], "json": json.dumps(json.loads(parts["json"]) | changes).encode()}


# What is still a pair, and must be given; then what is not, and the cause.
USABLE: dict[str, Fault] = {
    "PNG with alpha": _image(_save("PNG", "RGBA")),
    "palette": _image(_save("PNG", "P")),
    "CMYK JPEG": _image(_save("JPEG", "CMYK")),
    "GIF": _image(_save("GIF")),
    "animated WebP": _image(lambda image: _save("WEBP", save_all=True, append_images=[image.rotate(180)])(image)),
    "turned by EXIF": _image(_turned),
    "1 x 1 pixel": _image(lambda image: _save("PNG")(image.resize((1, 1)))),
    "1 x 60,000 pixels": _image(lambda image: _save("PNG")(image.resize((1, 60_000)))),
    "caption of 100 KB": lambda parts: parts | {"txt": parts["txt"] * (100_000 // max(1, len(parts["txt"])))},
    "caption of one word of 100 KB": lambda parts: parts | {"txt": random.Random(0).randbytes(50_000).hex().encode()},
    "emoji, right to left": lambda parts: parts | {"txt": "🐕‍🦺 שלום ‮ مرحبا".encode()},
    "caption not UTF-8": lambda parts: parts | {"txt": b"\xff\xfe\xe9 caf\xe9"},
    "half a surrogate pair": _json(caption="a dog \ud83d", captions=["\ud83d"]),
}
BAD: dict[str, tuple[Fault, str]] = {
    "JPEG cut off": (lambda parts: parts | {"jpg": parts["jpg"][: len(parts["jpg"]) // 2]}, "broken image"),
    "HTML saved as JPEG": (lambda parts: parts | {"jpg": b"<!DOCTYPE html><html>404</html>"}, "broken image"),
    "noise": (lambda parts: parts | {"jpg": random.Random(len(parts["jpg"])).randbytes(9000)}, "broken image"),
    "no bytes": (lambda parts: parts | {"jpg": b""}, "no image"),
    "claims 20,000 x 20,000 pixels": (lambda parts: parts | {"jpg": _huge(20_000)}, "oversized image"),
    "no caption": (lambda parts: {"jpg": parts["jpg"]}, "no caption"),
    "caption of blanks": (lambda parts: {"jpg": parts["jpg"], "txt": b" \n"}, "no caption"),
    "JSON nested 100,000 deep": (lambda parts: {"jpg": parts["jpg"], "json": b"[" * 100_000}, "no caption"),
    "key again": (lambda parts: parts, "duplicate key"),
}


def main(argv: list[str] | None = None) -> int:
    """Spoil, read, compare, write the table; returns how many good samples were lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bad_data", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="image-text shards")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", metavar="DIR", help="where the spoilt copy goes, to train on; else it is removed")
    parser.add_argument("--out", help="Markdown file")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        good, bad, rows = _spoil(expand_shards(options.data), folder)
        given, counted = _read(folder, options.workers)
    lost, wrong = good - given, given - good
    rows += [("shard of no bytes, of HTML, of zeros, cut off in its middle", 4, "their samples before the damage")]
    rows += [("shard without samples", 1, "nothing in it")]
    table_ = table(["put in", "times", "must become"], rows)
    text = (
        f"{sum(row[1] for row in rows):,} faults. {len(good):,} samples can be used, the odd ones among them.\n"
        f"Given: {len(given):,}. **Good samples lost: {len(lost)}. Bad samples given: {len(wrong)}.** Counted: "
        + ", ".join(f"{cause} {counted[cause]:,} (put in: {number:,})" for cause, number in bad.items())
        + ".\n"
    )
    pages([heading("Bad data: faults put into real shards", torch.device("cpu")), text, table_], options.out)
    return len(lost) + len(wrong) + sum(counted[cause] != number for cause, number in bad.items())


def _spoil(shards: list[str], folder: Path) -> tuple[set[int], Counter[str], list[tuple[str, int, str]]]:
    """Seeds of the good samples, numbers of bad ones by cause, and rows of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds: list[tuple[str, Fault, str]] = [(name, fault, "") for name, fault in USABLE.items()]
    kinds += [(name, fault, cause) for name, (fault, cause) in BAD.items()]
    good, bad, times, number = set[int](), Counter[str](), Counter[str](), 0
    for index, shard in enumerate(shards):
        target = folder / f"{index:05d}.tar"
        samples = list(read_samples(shard, lambda cause, where: None))
        end = len(samples) if index < len(shards) - 1 else len(samples) // 2
        with tarfile.open(target, "w") as tar:
            for place, (key, parts) in enumerate(samples):
                cause, key = "", key.rpartition("/")[2]
                if number % 10 == 9 and place < end:
                    name, fault, cause = kinds[number // 10 % len(kinds)]
                    parts, times[name] = fault(parts), times[name] + 1
                    if cause == "duplicate key":  # of each member; those that come first are used
                        _add(tar, key, parts)
                        bad[cause] += len(parts) - 1
                number += 1
                if place == end:
                    cut = tar.offset + 700
                if place < end and (not cause or cause == "duplicate key"):
                    good.add(_seed(folder, target, key))
                if cause:
                    bad[cause] += 1
                _add(tar, key, parts)
        if end < len(samples):
            with target.open("r+b") as file:
                file.truncate(cut)
    for name, content in (("a", b""), ("b", b"<!DOCTYPE html>" * 99), ("c", bytes(10_240)), ("d", bytes(1 << 20))):
        (folder / f"{name}.tar").write_bytes(content)
    bad["unreadable shard"] = 4
    return good, bad, [(name, times[name], cause or "a pair") for name, _, cause in kinds]


def _add(tar: tarfile.TarFile, key: str, parts: Parts) -> None:
    for ending, content in parts.items():
        member = tarfile.TarInfo(f"{key}.{ending}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _seed(folder: Path, shard: Path, key: str) -> int:
    return sample_seed(f"{folder.name}/{shard.stem}/{key}", 0, 0)


def _read(folder: Path, workers: int) -> tuple[set[int], Counter[str]]:
    loader = ResumableLoader(
        expand_shards(str(folder)),
        ImageText(eval_transform(64), Tokenize(77)),
        batch_size=50,
        num_workers=workers,
        train=False,
    )
    seeds = [seed for batch in loader for seed in batch["seed"].tolist()]
    if len(seeds) > len(set(seeds)):
        raise AssertionError("a sample was given twice")
    return set(seeds), Counter(loader.skipped)


if __name__ == "__main__":
    raise SystemExit(main() > 0)
