"""From a shard to image-text batches: read, filter, decode, collate; what is broken is skipped, counted."""

import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import import_module
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dtpvit.datamodules.tars import Fault, scan_shard
from dtpvit.datamodules.transforms import TrainTransform, to_pixels
from dtpvit.interop.preprocessing import EvalTransform, to_rgb
from dtpvit.json_input import parse_json

__all__ = [
    "CAUSES",
    "IMAGE_ENDINGS",
    "Decoded",
    "ImageText",
    "RawSample",
    "Skip",
    "SkippedSample",
    "captions_of",
    "decode_image",
    "decode_pixels",
    "raw_sample",
    "read_samples",
    "sample_seed",
]

CAUSES = (
    "unreadable shard",
    "unreadable file",
    "duplicate key",
    "no image",
    "no caption",
    "no label",
    "broken image",
    "oversized image",
)
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")

_MAX_PIXELS = 89_478_485  # 256 MiB of RGB, where PIL too starts to suspect a decompression bomb
_MOST_SCANS = 100  # of a progressive JPEG, which has about ten; each costs the time of a whole decoding
_MOST_SEGMENTS = 10_000  # of a JPEG, which has tens; a profile of colours in pieces has 255
_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # no stuffed byte, restart or filling
_LONGEST_CAPTION = 10_000  # characters, several times what a text tower reads
_LONG_WORD = re.compile(r"(\S{1000})\S+")  # pairing the bytes of such a one takes seconds, then minutes
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_CACHED_CAPTIONS = 32_768  # 20 MB of token rows at CLIP's context length
_RGB = 3  # torchvision's number for it
_logger = logging.getLogger(__name__)


def _jpeg_operator() -> Callable[..., Tensor] | None:
    """torchvision's decoder without its Python function, which 0.29 deprecates; None where it has none."""
    try:
        import_module("torchvision.io")
    except ImportError:
        return None
    return getattr(torch.ops.image, "decode_jpeg", None)


_decode_jpeg = _jpeg_operator()


Skip = Callable[[str, str], None]
"""Is told of what is left out: the cause, one of ``CAUSES``, and where."""


class SkippedSample(Exception):
    """This sample cannot be used; ``cause`` is one of ``CAUSES``."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class RawSample(NamedTuple):
    """One sample as it lies in the archive. ``key`` is unique over data sets: folder/shard/key."""

    key: str
    image: bytes
    text: bytes | None
    meta: bytes | None


class Decoded(NamedTuple):
    """One sample ready for its batch; ``image`` is uint8 (3, H, W)."""

    image: Tensor
    caption: str
    seed: int
    key: str


def read_samples(shard: str, skip: Skip) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members (by lower-case ending) of every sample of a shard; neighbours with one key are one.

    ``skip`` is called for every duplicate, and once if the shard is damaged. The sample at which damage begins is not
    yielded, for it may be incomplete.
    """
    prefix = "/".join(PurePath(shard).parts[-2:]).rsplit(".tar", 1)[0]
    for found in scan_shard(shard):
        if isinstance(found, Fault):
            if found.cause == "unreadable shard":
                _logger.warning("Skipping the rest of a shard: %s", found.where)
                skip(found.cause, found.where)
            else:
                skip(found.cause, f"{prefix}/{found.where}")
        else:
            key, parts = found
            yield f"{prefix}/{key}", parts


def raw_sample(key: str, parts: dict[str, bytes]) -> RawSample:
    """Image and caption of a sample's members, undecoded.

    Raises:
        SkippedSample: If it has no image, or nothing that might hold a caption.
    """
    image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
    text, meta = parts.get("txt"), parts.get("json")
    if not image:
        raise SkippedSample("no image")
    if not text and not meta:
        raise SkippedSample("no caption")
    return RawSample(key, image, text, meta)


def captions_of(raw: RawSample, captions_field: str | None = "captions") -> list[str]:
    """The captions among which an epoch chooses: the list ``captions_field`` of the json, or else the one caption.

    Raises:
        SkippedSample: If there is none, or nothing is written in it.
    """
    meta: dict[str, Any] = {}
    if raw.meta and (not raw.text or (captions_field and f'"{captions_field}"'.encode() in raw.meta)):
        meta = _load_json(raw.meta)
    several = meta.get(captions_field) if captions_field else None
    if isinstance(several, list):
        several = [caption for caption in several if isinstance(caption, str) and caption.strip()]
        if several:
            return several
    caption = raw.text.decode("utf-8", "replace") if raw.text else meta.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise SkippedSample("no caption")
    return [caption]


def _encodable(caption: str) -> str:
    """The beginning of a caption, as text that can be encoded, which half a surrogate pair in a JSON cannot."""
    return _LONG_WORD.sub(r"\1", caption.strip()[:_LONGEST_CAPTION]).encode("utf-8", "replace").decode()


def sample_seed(key: str, epoch: int, seed: int) -> int:
    """Non-negative 62-bit hash of a sample's key, the epoch and the run's seed."""
    # Names of files need not be text; Python has surrogates for such bytes.
    digest = blake2b(f"{key}|{epoch}|{seed}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def decode_image(data: bytes, *, upright: bool = True) -> Image.Image:
    """RGB image, turned upright by its EXIF orientation unless it is to stay as stored.

    Raises:
        SkippedSample: If the image is broken, cut off, or so large that decoding it would be an attack.
    """
    with _refusals():
        return _decode(_open(data), upright)


def decode_pixels(data: bytes, min_side: int) -> Tensor:
    """uint8 (3, H, W), channels last in memory: the pixels of ``decode_image``, sooner.

    A JPEG whose short side is at least twice ``min_side`` is decoded at 1/2, 1/4 or 1/8 size, its short side
    staying at least that. For a damaged file, libjpeg may print a line to stderr.

    Raises:
        SkippedSample: As ``decode_image`` does.
    """
    with _refusals():
        image = _open(data)
        if image.format == "JPEG":
            if min(image.size) >= 2 * min_side:
                image.draft(image.mode, (min_side, min_side))
            elif image.mode in ("RGB", "L") and "exif" not in image.info and (pixels := _libjpeg(data)) is not None:
                return pixels
        return to_pixels(_decode(image))


def _open(data: bytes) -> Image.Image:
    """Only the header is read."""
    if data.count(b"\xff\xda") > _MOST_SCANS and data.startswith(b"\xff\xd8") and _has_many_scans(data):
        raise SkippedSample("broken image")
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > _MAX_PIXELS:
        raise SkippedSample("oversized image")
    return image


def _has_many_scans(data: bytes) -> bool:
    """Whether a JPEG has too many scans up to its end; cameras append videos, in which anything may stand."""
    position = 2
    scans = 0
    for _ in range(_MOST_SEGMENTS):
        found = _SEGMENT.search(data, position)
        if found is None or found[0] == b"\xff\xd9":
            return False
        scans += found[0] == b"\xff\xda"
        if scans > _MOST_SCANS:
            return True
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return True


def _decode(image: Image.Image, upright: bool = True) -> Image.Image:
    image.load()
    if upright and "exif" in image.info:
        image = _upright(image)
    return to_rgb(image)


def _libjpeg(data: bytes) -> Tensor | None:
    """What PIL decodes, in three quarters of its time and without its copies; None leaves it to PIL."""
    if _decode_jpeg is None:
        return None
    try:
        return _decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB, False)
    except (RuntimeError, TypeError):  # a damaged image, or an operator of another version
        return None


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SkippedSample("oversized image") from None
    except SkippedSample:
        raise
    except Exception:  # PIL's plugins raise nearly anything on damaged input
        raise SkippedSample("broken image") from None


@dataclass
class ImageText:
    """How an image-text sample is read, decoded and collated; picklable, one per worker.

    Attributes:
        transform: PIL image -> uint8 tensor (3, H, W); a ``TrainTransform`` is given the sample's own seed.
        tokenize: Captions -> int64 tensor (n, context).
        seed: The run's seed.
        captions_field: List of captions in a sample's json, of which each epoch takes one, by the sample's
            hash; samples without it, and all if None, use their ``.txt`` (or the json's ``caption``).
    """

    transform: TrainTransform | EvalTransform
    tokenize: Callable[[list[str]], Tensor]
    seed: int = 0
    captions_field: str | None = "captions"
    _rows: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def read(self, shard: str, skip: Skip) -> Iterator[RawSample]:
        """The samples of a shard that have an image and some caption, undecoded."""
        for key, parts in read_samples(shard, skip):
            try:
                raw = raw_sample(key, parts)
            except SkippedSample as skipped:
                skip(skipped.cause, key)
            else:
                yield raw

    def decode(self, raw: RawSample, epoch: int) -> Decoded:
        """Image, caption and seed of a sample, the same for one epoch wherever and whenever it is decoded.

        Raises:
            SkippedSample: If the image is broken or the caption is empty.
        """
        seed = sample_seed(raw.key, epoch, self.seed)
        captions = captions_of(raw, self.captions_field)
        caption = _encodable(captions[seed % len(captions)])
        if isinstance(self.transform, TrainTransform):
            image = self.transform(decode_pixels(raw.image, self.transform.min_side), seed)
        else:
            image = self.transform(decode_image(raw.image))
        return Decoded(image, caption, seed, raw.key)

    def collate(self, samples: list[Decoded]) -> dict[str, Any]:
        """{"image": uint8 (B, 3, H, W), "text": int64 (B, context), "seed": int64 (B,), "key": B names}."""
        return {
            "image": torch.stack([sample.image for sample in samples]),
            "text": torch.stack(self._tokens([sample.caption for sample in samples])),
            "seed": torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
            "key": [sample.key for sample in samples],
        }

    def _tokens(self, captions: list[str]) -> list[Tensor]:
        known = self._rows
        new = list(dict.fromkeys(caption for caption in captions if caption not in known))
        fresh = dict(zip(new, self.tokenize(new), strict=True)) if new else {}
        rows = [fresh[caption] if caption in fresh else known[caption] for caption in captions]
        if len(known) + len(fresh) <= _CACHED_CAPTIONS:
            known.update(fresh)
        return rows


def _load_json(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an unreadable EXIF block is no reason to lose the image
        return image
