"""Quickstart data made on the spot: captioned scenes of coloured shapes, in img2dataset's kind of shards.

Some pairs of colour and shape never occur in training, so that zero-shot accuracy can be told from memory.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dtpvit.datamodules.image_text import ImageTextShards
from dtpvit.datamodules.scenes import CLASSES, HELD_OUT, SEEN, Scene, draw_scene
from dtpvit.datamodules.shard_survey import default_workers
from dtpvit.datamodules.worker_signals import end_with_parent
from dtpvit.errors import UserError

__all__ = ["ShapesDataModule", "ShapesParameters", "generate_shapes"]

_VERSION = 2  # raised whenever the same parameters give other bytes
_TEMPLATES = ("a {c}", "a photo of a {c}", "a picture of a {c}", "an image with a {c}")
_LABELLED = {"seen": SEEN, "heldout": HELD_OUT}


@dataclass(frozen=True)
class ShapesParameters:
    """What the bytes on disk depend on, and nothing else.

    Attributes:
        seed: Two seeds share no scene.
        num_train, num_val: Captioned scenes.
        num_test: Labelled scenes of one shape, for each pair of colour and shape.
        side: Pixels of a side.
        shard_size: Scenes of a shard.
    """

    seed: int = 0
    num_train: int = 20_000
    num_val: int = 1_000
    num_test: int = 20
    side: int = 64
    shard_size: int = 1_000

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_val, self.num_test, self.shard_size) < 1 or self.side < 16:
            raise UserError(f"{self} cannot be drawn; give at least one scene of each kind and 16 pixels a side.")


@dataclass(frozen=True)
class _Shard:
    """One file to write: scenes ``first`` to ``last`` (excluded) of a split."""

    folder: str
    split: str
    number: int
    first: int
    last: int
    parameters: ShapesParameters


class ShapesDataModule(ImageTextShards):
    """Generated shapes: drawn on first use, then the plain data module on those shards.

    Training and ``val`` are captioned scenes of one to three shapes; ``zeroshot`` is the folder ``seen``. The
    folder ``heldout`` has the pairs that training never shows, with the same 64 candidate classes.

    Args:
        root: Folder to write; drawn anew if it was drawn with other parameters.
        num_train, num_val: Captioned scenes.
        num_test: Labelled scenes of each pair of colour and shape.
        side: Pixels of a side.
        processes: That draw; None takes every core.
        batch_size, val_batch_size, num_workers, image_size, tokenize, crop_scale, flip, shuffle_buffer, seed:
            As in ``ImageTextShards``; ``seed`` also decides what is drawn.
    """

    def __init__(
        self,
        *,
        root: str = "data/shapes/generated",
        num_train: int = 20_000,
        num_val: int = 1_000,
        num_test: int = 20,
        side: int = 64,
        processes: int | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 2,
        image_size: int | tuple[int, int] | None = None,
        tokenize: Callable[[list[str]], Tensor] | None = None,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        flip: bool = False,
        shuffle_buffer: int = 2000,
        seed: int = 0,
    ) -> None:
        folder = Path(root).expanduser()
        super().__init__(
            train=str(folder / "train"),
            val=str(folder / "val"),
            zeroshot=str(folder / "seen"),
            zeroshot_classnames=str(folder / "seen" / "classnames.txt"),
            zeroshot_templates=str(folder / "seen" / "templates.txt"),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size,
            tokenize=tokenize,
            crop_scale=crop_scale,
            flip=flip,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
        )
        self.root, self.processes = folder, processes
        # Several shards however few the scenes are, so that workers need not read the same ones.
        shard_size = min(1_000, max(1, num_train // 8))
        self.parameters = ShapesParameters(seed, num_train, num_val, num_test, side, shard_size)

    def prepare_data(self) -> None:
        """Draw the scenes, unless they are there.

        Raises:
            UserError: If ``root`` holds something that this class did not write, or a process is killed.
        """
        generate_shapes(self.root, self.parameters, processes=self.processes)


def generate_shapes(root: Path, parameters: ShapesParameters, *, processes: int | None = None) -> bool:
    """Write all splits to ``root``, at once or not at all; False if they were there already.

    The bytes do not depend on ``processes`` (None: every core).

    Raises:
        UserError: If ``root`` holds something that this function did not write, or a process is killed.
    """
    if _is_drawn(root, parameters):
        return False
    if root.exists() and not (root / "shapes.json").is_file() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} holds something other than generated shapes; choose another root or empty it.")
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
        _write_all(Path(scratch) / "new", parameters, processes)
        _put_in_place(Path(scratch), root, parameters)
    return True


def _is_drawn(root: Path, parameters: ShapesParameters) -> bool:
    try:
        return json.loads((root / "shapes.json").read_text()) == _record(parameters)
    except (OSError, ValueError):
        return False


def _record(parameters: ShapesParameters) -> dict[str, int]:
    return {"version": _VERSION, **asdict(parameters)}


def _put_in_place(scratch: Path, root: Path, parameters: ShapesParameters) -> None:
    try:
        if root.exists():
            root.rename(scratch / "old")
        (scratch / "new").rename(root)
    except OSError:
        # Another node that shares this file system was faster; its bytes are the same.
        if not _is_drawn(root, parameters):
            raise


def _write_all(folder: Path, parameters: ShapesParameters, processes: int | None) -> None:
    shards = list(_plan(folder, parameters))
    for name in ("train", "val", *_LABELLED):
        (folder / name).mkdir(parents=True)
    workers = min(processes or default_workers(), len(shards))
    scenes = sum(shard.last - shard.first for shard in shards)
    with tqdm(total=scenes, desc="Drawing shapes", unit="scene") as bar:
        if workers == 1:
            for shard in shards:
                bar.update(_write_shard(shard))
        else:
            try:
                with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
                    for written in pool.map(_write_shard, shards):
                        bar.update(written)
            except BrokenProcessPool:
                raise UserError(
                    "One of the processes that draw was killed, probably for want of memory; give fewer processes."
                ) from None
    for name in _LABELLED:
        _write_lines(folder / name / "classnames.txt", [f"{colour} {shape}" for colour, shape in CLASSES])
        _write_lines(folder / name / "templates.txt", _TEMPLATES)
    (folder / "shapes.json").write_text(json.dumps(_record(parameters), indent=1) + "\n")


def _plan(folder: Path, parameters: ShapesParameters) -> Iterator[_Shard]:
    totals = {"train": parameters.num_train, "val": parameters.num_val}
    totals |= {split: parameters.num_test * len(pairs) for split, pairs in _LABELLED.items()}
    for split, total in totals.items():
        for number, first in enumerate(range(0, total, parameters.shard_size)):
            last = min(total, first + parameters.shard_size)
            yield _Shard(str(folder / split), split, number, first, last, parameters)


def _write_shard(shard: _Shard) -> int:
    """Write one tar and its ``_stats.json``; the number of scenes in it."""
    count = shard.last - shard.first
    path = Path(shard.folder) / f"{shard.number:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(count):
            key = f"{shard.number:05d}{index:04d}"
            for ending, data in _members(shard, shard.first + index, key).items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
    stats = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
    stats |= {"duration": 0.0, "start_time": 0.0, "end_time": 0.0, "status_dict": {"success": count}}
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats, indent=1) + "\n")
    return count


def _members(shard: _Shard, index: int, key: str) -> dict[str, bytes]:
    parameters = shard.parameters
    seed = f"{parameters.seed}/{shard.split}/{index}"
    if shard.split in _LABELLED:
        pairs = _LABELLED[shard.split]
        pair = pairs[index % len(pairs)]
        scene = draw_scene(seed, parameters.side, [pair], max_shapes=1)
        image = _jpeg(scene)
        return {"jpg": image, "cls": str(CLASSES.index(pair)).encode(), "txt": scene.caption.encode()}
    scene = draw_scene(seed, parameters.side, SEEN)
    image = _jpeg(scene)
    return {"jpg": image, "txt": scene.caption.encode(), "json": _meta(scene, image, key, parameters.side)}


def _jpeg(scene: Scene) -> bytes:
    stream = io.BytesIO()
    # Whole-resolution colour: at 64 pixels the usual halving of chroma smears the very thing to be learnt.
    scene.image.save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _meta(scene: Scene, image: bytes, key: str, side: int) -> bytes:
    """img2dataset's fields, and what is in the scene."""
    fields: dict[str, Any] = {"caption": scene.caption, "url": "", "key": key, "status": "success"}
    fields |= {"error_message": None, "width": side, "height": side, "original_width": side}
    fields |= {"original_height": side, "exif": "{}", "sha256": hashlib.sha256(image).hexdigest()}
    fields |= {"ground": scene.ground, "shapes": [_rounded(asdict(placed)) for placed in scene.shapes]}
    return json.dumps(fields).encode()


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}


def _write_lines(path: Path, lines: list[str] | tuple[str, ...]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
