"""Small real shards for the tests of this folder, and where the optional real data lies."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"needs the real data of shared/data/{name}")
    return folder


def jpeg(number: int, size: tuple[int, int] = (24, 20), **save) -> bytes:
    """A JPEG whose pixels are a function of ``number``."""
    pixels = np.random.RandomState(number).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(stream, "JPEG", **save)
    return stream.getvalue()


def pair(number: int, image: bytes | None = None) -> dict[str, bytes]:
    """Members of one sample, by ending."""
    return {"jpg": jpeg(number) if image is None else image, "txt": f"caption {number}".encode()}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]], *, stats: bool = True, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, **({"mode": "w"} | options)) as tar:
        for key, parts in samples.items():
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if stats:
        stem = path.name.split(".")[0]
        path.with_name(f"{stem}_stats.json").write_text(json.dumps({"successes": len(samples)}))
    return str(path)


def write_shards(folder: Path, counts: list[int], broken: tuple[int, ...] = ()) -> list[str]:
    """Shards of that many samples, numbered through; the images of ``broken`` ones are cut off."""
    shards, number = [], 0
    for index, count in enumerate(counts):
        samples = {}
        for _ in range(count):
            image = jpeg(number)[:200] if number in broken else None
            samples[f"{number:09d}"] = pair(number, image)
            number += 1
        shards.append(write_tar(folder / f"{index:05d}.tar", samples))
    return shards


def tokenize(captions: list[str]) -> torch.Tensor:
    """Row = (number in the caption, 0, 0, 7), so that a test can tell which sample it is."""
    return torch.tensor([[int(caption.split()[-1]), 0, 0, 7] for caption in captions], dtype=torch.int64)


def numbers(batches) -> list[list[int]]:
    """Which samples each batch holds."""
    return [batch["text"][:, 0].tolist() for batch in batches]
