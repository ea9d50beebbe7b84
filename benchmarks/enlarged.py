"""Large photographs where there are none: upscaled copies of the images of given shards."""

import io
import json
import random
import tarfile
from pathlib import Path

from PIL import Image

from dtpvit.datamodules.tars import read_members

__all__ = ["enlarge"]


def enlarge(shards: list[str], folder: Path, least: int, most: int, count: int) -> list[str]:
    """One shard in ``folder`` with the first ``count`` images of ``shards``, and the texts beside them.

    The short side is drawn from ``least`` to ``most`` pixels; JPEG quality 95. Upscaled images are smoother
    than photographs of that size, so their files are smaller and Huffman decoding has less to do.
    """
    draw, path, found = random.Random(0), folder / "00000.tar", 0
    with tarfile.open(path, "w") as tar:
        for number, shard in enumerate(shards):
            for name, data in read_members(shard):
                if name.endswith(".jpg"):
                    if found == count:
                        break
                    found += 1
                    data = _enlarged(data, draw.randint(least, most))
                member = tarfile.TarInfo(f"{number}-{name.replace('/', '-')}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path.with_name("00000_stats.json").write_text(json.dumps({"successes": found}))
    return [str(path)]


def _enlarged(data: bytes, side: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue()
