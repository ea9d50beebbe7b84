"""Small labelled data sets for the tests of this folder: class folders, and shards of the same images."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from shard_files import write_tar

CLASSES = ["ant", "bee", "cat"]


def plain_png(number: int) -> bytes:
    """One colour all over, which no crop or flip changes: ``who`` reads the number back."""
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (number % 16 * 16, number // 16 * 16, 7)).save(stream, "PNG")
    return stream.getvalue()


def noisy_jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """No two crops of it are alike."""
    stream = io.BytesIO()
    pixels = np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def who(batches) -> list[int]:
    """Numbers of the plain images in batches."""
    corners = torch.cat([batch["image"][:, :, 0, 0] for batch in batches]).long()
    return (corners[:, 0] // 16 + corners[:, 1] // 16 * 16).tolist()


def make_tree(root: Path, per_class: int = 8, *, make=plain_png, classes=CLASSES, broken: tuple[int, ...] = ()) -> str:
    """Class folders; image ``i`` of class ``c`` has the number ``c * per_class + i``."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(c * per_class, (c + 1) * per_class):
            content = b"<html>404</html>" if number in broken else make(number)
            (root / name / f"{number:04d}.jpg").write_bytes(content)
    return str(root)


def make_shards(root: Path, tree: str, per_shard: int = 9, *, names: bool = True, stats: bool = True) -> str:
    """Shards of a tree's images, in its order."""
    folders = sorted(Path(tree).iterdir())
    images = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    for shard, start in enumerate(range(0, len(images), per_shard)):
        samples = {
            file.stem: {"jpg": file.read_bytes(), "cls": str(label).encode()}
            for file, label in images[start : start + per_shard]
        }
        write_tar(root / f"{shard:05d}.tar", samples, stats=stats)
    if names:
        (root / "classnames.txt").write_text("\n".join(folder.name for folder in folders))
    return str(root)
