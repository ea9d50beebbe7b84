"""What is fuzzed: valid files, how they are spoilt, and how each is read as training and evaluation read it."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from PIL import Image

from benchmarks.fuzz_inputs import (
    Mutate,
    spoil_bytes,
    spoil_gzip,
    spoil_headers,
    spoil_image,
    spoil_tar,
    spoil_text,
    spoil_zip,
)
from dtpvit.cli import main
from dtpvit.datamodules.augment import Augmentation
from dtpvit.datamodules.conversations import read_conversations
from dtpvit.datamodules.labelled_recipe import LabelledImage, RawLabelled
from dtpvit.datamodules.labelled_shards import index_tar
from dtpvit.datamodules.samples import ImageText, RawSample, SkippedSample, read_samples
from dtpvit.datamodules.shard_count import count
from dtpvit.datamodules.shards import count_samples
from dtpvit.datamodules.tars import BrokenTar, index_members
from dtpvit.datamodules.transforms import train_transform
from dtpvit.errors import UserError
from dtpvit.evaluation.vqa_questions import read_questions
from dtpvit.interop.loading import Tokenize
from dtpvit.interop.preprocessing import eval_transform
from dtpvit.interop.weight_files import damage, read_checkpoint, state_of

__all__ = ["TARGETS", "Target"]

Read = Callable[[bytes, Path], str]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: For the table.
        share: Of all inputs, in parts.
        seeds: Makes the valid files.
        mutate: Spoils them.
        read: Given a spoilt file's content and a folder to put it into, reads it as the product does, and says what
            came of it: "accepted", or the cause for which it was refused. Whatever it raises is a fault of ours.
    """

    name: str
    share: float
    seeds: Callable[[], Sequence[bytes]]
    mutate: Mutate
    read: Read


def _encoded(image: Image.Image, form: str, **save: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **save)
    return stream.getvalue()


def _images() -> list[bytes]:
    random = Random(0)
    photo = Image.frombytes("RGB", (40, 24), random.randbytes(40 * 24 * 3)).resize((96, 64))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    frames = {"save_all": True, "append_images": [photo.rotate(90)]}
    seeds = [_encoded(photo, "JPEG", quality=q, progressive=p, exif=exif) for q, p in ((60, False), (90, True))]
    seeds += [_encoded(photo.convert(mode), "JPEG") for mode in ("L", "CMYK", "RGB")]
    seeds += [_encoded(photo.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")]
    seeds += [_encoded(Image.new("I;16", (30, 20), 40_000), "PNG"), _encoded(photo, "PNG", **frames, exif=exif)]
    seeds += [_encoded(photo, "WEBP", lossless=flag) for flag in (True, False)] + [_encoded(photo, "WEBP", **frames)]
    seeds += [_encoded(photo, "GIF", **frames), _encoded(photo, "BMP"), _encoded(photo.convert("P"), "BMP")]
    seeds += [_encoded(photo, "TIFF", compression=how) for how in ("raw", "tiff_lzw", "jpeg", "tiff_deflate")]
    return seeds


def _tar(samples: dict[str, bytes], form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue().rstrip(b"\0") + bytes(1024 + 512)


def _tars() -> list[bytes]:
    samples = {
        "0.jpg": _images()[0][:700], "0.txt": b"a cat", "0.json": b'{"caption": "a cat"}', "0.cls": b"3",
        "folder/" * 20 + "1.jpg": b"x" * 513, "folder/" * 20 + "1.cls": b"7", "2.png": b"",
        "ü.jpg": b"y", "ü.cls": b"0",
    }  # fmt: skip
    seeds = [_tar(samples, form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    return [seed + bytes(-len(seed) % 512) for seed in seeds]


def _conversations() -> list[dict[str, object]]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    return [
        {"id": "a", "image": "a.png", "conversations": turns},
        {"id": 2, "images": ["a.png"], "conversations": [{"from": "system", "value": "Be brief."}, *turns]},
        {"messages": said},
    ]


def _json_lines() -> list[bytes]:
    return ["\n".join(map(json.dumps, _conversations())).encode()]


def _json_list() -> list[bytes]:
    return [json.dumps(_conversations()).encode(), json.dumps(_conversations()[:1], indent=1).encode()]


def _captions() -> list[bytes]:
    return [json.dumps({"caption": "a cat", "key": "0", "width": 3}).encode(), b'{"captions": ["a cat", "a dog", ""]}']


def _questions() -> list[bytes]:
    rows = [{"question_id": 1, "image": "a.png", "text": "what?"}, {"question_id": "b", "text": "who?", "image": ["x"]}]
    science = {"1": {"question": "which?", "choices": ["a", "b"], "answer": 0}}
    listed = {"questions": rows}
    return ["\n".join(map(json.dumps, rows)).encode(), json.dumps(rows).encode(), *_json_list()] + [
        json.dumps(science).encode(), json.dumps(listed).encode()
    ]  # fmt: skip


def _stats() -> list[bytes]:
    stats = {"count": 9, "successes": 5, "failed_to_download": 4, "status_dict": {"success": 5, "HTTP Error 404: x": 3}}
    return [json.dumps(stats).encode(), json.dumps({"0.tar": 5, "1.tar": 0}).encode()]


def _saved(legacy: bool) -> list[bytes]:
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)}
    base = torch.zeros(4, 4)
    shared = {"state_dict": {"module.x": base, "module.y": base[1:, ::2]}, "epoch": 3, "hyper_parameters": {"lr": 1e-3}}
    seeds = []
    for content in (tensors, shared):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
        seeds.append(stream.getvalue())
    return seeds


def _safetensors() -> list[bytes]:
    from safetensors.torch import save

    return [
        save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}),
        save({"c": torch.ones(1)}),
    ]


def _configs() -> list[bytes]:
    folder = Path(__file__).parents[1] / "configs"
    return [(folder / name).read_bytes() for name in ("quickstart.yaml", "flickr8k_small.yaml", "cifar10.yaml")]


# ------------------------------------------------------------------ reading


def _refused(act: Callable[[], object], sort: Callable[[UserError], str] = lambda error: "UserError") -> str:
    try:
        act()
    except SkippedSample as skipped:
        return skipped.cause
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("a UserError of several lines") from error
        return sort(error)
    return "accepted"


def _read_shard(ending: str, data: bytes, folder: Path) -> str:
    path = folder / f"0{ending}"
    path.write_bytes(data)
    causes: list[str] = []
    for _ in read_samples(str(path), lambda cause, where: causes.append(cause)):
        pass
    return " + ".join(sorted(set(causes))) or "accepted"


def _index_shard(data: bytes, folder: Path) -> str:
    path = folder / "0.tar"
    path.write_bytes(data)
    try:
        for _, offset, size in index_members(str(path)):
            if not 0 <= offset <= offset + size <= len(data):
                raise AssertionError("a member outside of its file")
    except BrokenTar:
        return "unreadable shard"
    return _refused(lambda: index_tar(str(path)))


_RANDOM_CROP, _WHOLE = train_transform(32, scale=(0.3, 1.0)), eval_transform(32)
_AUGMENTED = LabelledImage(Augmentation(32, auto_augment="rand-m9-mstd0.5-inc1"), 10)


def _read_image(data: bytes, folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata
        found = {
            _refused(lambda: ImageText(_RANDOM_CROP, _tokenize).decode(RawSample("k", data, b"a cat", None), 0)),
            _refused(lambda: ImageText(_WHOLE, _tokenize).decode(RawSample("k", data, b"a cat", None), 0)),
            _refused(lambda: _AUGMENTED.decode(RawLabelled("k", data, 1), 0)),
        }
    return min(found, key=lambda outcome: outcome != "accepted")


_tokenize = Tokenize(16)


def _read_caption(data: bytes, folder: Path) -> str:
    recipe = ImageText(_WHOLE, _tokenize)
    return _refused(lambda: recipe.collate([recipe.decode(RawSample("k", _PIXEL, None, data), 0)]))


_PIXEL = _encoded(Image.new("RGB", (1, 1)), "PNG")


def _read_records(ending: str, data: bytes, folder: Path) -> str:
    (folder / "a.png").write_bytes(_PIXEL)
    path = folder / f"records{ending}"
    path.write_bytes(data)
    skipped: list[str] = []

    def read() -> None:
        found = read_conversations(str(path))
        skipped.extend(one.cause for one in found.skipped)
        for index in range(len(found)):
            found[index]

    outcome = _refused(read)
    return " + ".join(sorted(set(skipped))) or outcome


def _read_questions(data: bytes, folder: Path) -> str:
    path = folder / "questions.jsonl"
    path.write_bytes(data)
    return _refused(lambda: read_questions(str(path)))


def _read_stats(data: bytes, folder: Path) -> str:
    shard = folder / "0.tar"
    shard.touch()
    for name in ("0_stats.json", "sizes.json"):
        (folder / name).write_bytes(data)
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = _refused(lambda: count([str(shard)], out=str(folder / "out.json")))
    return "not believed" if count_samples([str(shard)]) is None else outcome


def _read_weights(ending: str, mmap: bool, data: bytes, folder: Path) -> str:
    path = folder / f"weights{ending}"
    path.write_bytes(data)

    def read() -> None:
        for value in state_of(read_checkpoint(path, mmap=mmap)).values():
            if value.device.type != "meta" and value.numel() < 1 << 20:
                value.float().sum()

    return _refused(read, _weights_cause)


def _read_to_its_end(data: bytes, folder: Path) -> str:
    path = folder / "weights.ckpt"
    path.write_bytes(data)
    return (damage(path) or "accepted").partition(" in ")[0]


def _weights_cause(error: UserError) -> str:
    phrases = ("more than tensors", "damaged or no checkpoint", "holds no tensors", "expected a mapping")
    return next((phrase for phrase in phrases if phrase in str(error)), "UserError")


def _read_config(data: bytes, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_bytes(data)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = main(["fit", "--config", str(path), "--print_config"])
        except SystemExit as end:
            code = end.code or 0
    if code not in (0, 2):
        raise AssertionError(f"exit code {code}: {said.getvalue()[-500:]}")
    return "exit code 2" if code else "accepted"


TARGETS = (
    Target("tar shard", 18, _tars, spoil_tar, partial(_read_shard, ".tar")),
    Target("tar shard, compressed", 6, _tars, spoil_gzip, partial(_read_shard, ".tar.gz")),
    Target("tar shard, indexed", 10, _tars, spoil_tar, _index_shard),
    Target("image", 20, _images, spoil_image, _read_image),
    Target("caption json", 8, _captions, spoil_text, _read_caption),
    Target("conversations, json", 8, _json_list, spoil_text, partial(_read_records, ".json")),
    Target("conversations, jsonl", 8, _json_lines, spoil_text, partial(_read_records, ".jsonl")),
    Target("questions", 8, _questions, spoil_text, _read_questions),
    Target("sizes.json, _stats.json", 4, _stats, spoil_text, _read_stats),
    Target("checkpoint, zip", 4, partial(_saved, False), spoil_zip, partial(_read_weights, ".ckpt", False)),
    Target("checkpoint, zip, mapped", 2, partial(_saved, False), spoil_zip, partial(_read_weights, ".ckpt", True)),
    Target("checkpoint, zip, checksums", 2, partial(_saved, False), spoil_headers, _read_to_its_end),
    Target("checkpoint, legacy", 4, partial(_saved, True), spoil_bytes, partial(_read_weights, ".pth", False)),
    Target("checkpoint, safetensors", 4, _safetensors, spoil_bytes, partial(_read_weights, ".safetensors", False)),
    Target("config", 0.2, _configs, spoil_text, _read_config),
)
