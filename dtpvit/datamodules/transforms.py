"""From a PIL image to a uint8 tensor; normalisation is left to the device."""

import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dtpvit.errors import UserError

__all__ = [
    "INTERPOLATIONS",
    "EvalTransform",
    "ResizeMode",
    "TrainTransform",
    "eval_transform",
    "height_width",
    "to_pixels",
    "to_rgb",
    "to_tensor",
    "train_transform",
]

ResizeMode = Literal["shortest", "longest", "squash"]

INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)

_SPARE = 1.5
_WHITE = (255, 255, 255)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_ASPECT = (math.log(3 / 4), math.log(4 / 3))


def train_transform(
    image_size: int | tuple[int, int], *, scale: tuple[float, float] = (0.9, 1.0), flip: bool = False
) -> "TrainTransform":
    """Random resized crop to ``image_size`` (height, width), optionally mirrored half of the time.

    ``scale`` bounds the share of the image's area that the crop keeps.

    Raises:
        UserError: If a size is not positive or ``scale`` is not within (0, 1].
    """
    low, high = scale
    if not 0 < low <= high <= 1:
        raise UserError(f"The crop scale is {list(scale)}; give two shares of the area, 0 < low <= high <= 1.")
    return TrainTransform(height_width(image_size), (float(low), float(high)), flip)


def eval_transform(
    image_size: int | tuple[int, int],
    *,
    resize_mode: str = "shortest",
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
) -> "EvalTransform":
    """Resize, centre crop, RGB: open_clip's evaluation transform, without its normalisation.

    With another ``crop_pct`` it is timm's: the image is first brought to ``floor(image_size / crop_pct)``, so that
    the crop keeps that share of its short side.

    Raises:
        UserError: If a size is not positive, ``crop_pct`` is not within (0, 1], ``resize_mode`` is none of shortest,
            longest, squash, or the interpolation is none of PIL's.
    """
    if resize_mode not in get_args(ResizeMode):
        raise UserError(f"The resize mode is {resize_mode!r}; choose one of {', '.join(get_args(ResizeMode))}.")
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct is {crop_pct}; give the share of the short side that is kept, 0 < crop_pct <= 1.")
    if interpolation not in INTERPOLATIONS:
        raise UserError(f"The interpolation is {interpolation!r}; choose one of {', '.join(INTERPOLATIONS)}.")
    return EvalTransform(height_width(image_size), resize_mode, float(crop_pct), interpolation)


@dataclass(frozen=True)
class TrainTransform:
    """Image -> uint8 tensor (3, H, W). With a ``seed`` the result depends on image and seed alone.

    An image is of PIL, or uint8 (3, height, width), best with channels last in memory.
    """

    image_size: tuple[int, int]
    scale: tuple[float, float] = (0.9, 1.0)
    flip: bool = False

    @property
    def min_side(self) -> int:
        """Pixels of the short side that a decoder should keep.

        Half as much again as the crop needs, so that the last halving is left to the better filter.
        """
        return int(_SPARE * max(self.image_size) / self.scale[0] ** 0.5)

    def __call__(self, image: Image.Image | Tensor, seed: int | None = None) -> Tensor:
        draw = random.Random(int(torch.randint(2**62, ())) if seed is None else seed)
        pixels = image if isinstance(image, Tensor) else to_pixels(to_rgb(image))
        left, top, right, bottom = _random_box(pixels.shape[2], pixels.shape[1], self.scale, draw)
        pixels = pixels[:, top:bottom, left:right]
        if pixels.shape[1:] != self.image_size:
            # Four times as fast as PIL's bicubic filter and within two grey levels of it.
            pixels = F.interpolate(pixels[None], size=self.image_size, mode="bicubic", antialias=True)[0]
        if self.flip and draw.random() < 0.5:
            pixels = pixels.flip(2)
        return pixels.contiguous()


@dataclass(frozen=True)
class EvalTransform:
    """PIL image -> uint8 tensor (3, H, W); nothing random."""

    image_size: tuple[int, int]
    resize_mode: str = "shortest"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image) -> Tensor:
        image = to_rgb(image)
        height, width = self.image_size
        size = self._resized(image.width, image.height)
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = _centre(image.width, width), _centre(image.height, height)
        if (left, top) != (0, 0) or image.size != (width, height):
            # PIL fills what lies outside the image with black: that is open_clip's padding too.
            image = image.crop((left, top, left + width, top + height))
        return to_tensor(image)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize. The two roundings are open_clip's and timm's own."""
        to_height, to_width = (math.floor(side / self.crop_pct) for side in self.image_size)
        if self.resize_mode == "squash":
            return to_width, to_height
        if self.resize_mode == "shortest" and to_height == to_width:
            long = int(to_width * max(width, height) / min(width, height))
            return (to_width, long) if width <= height else (long, to_width)
        ratios = height / to_height, width / to_width
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB: transparency is laid on white, 16-bit samples are scaled, not clipped."""
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.size and values.max() > 255:
            values = values >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, _WHITE)
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> uint8 tensor (3, H, W), channels last in memory, as PIL and the fast resize have them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 tensor (3, H, W), contiguous."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def _random_box(width: int, height: int, scale: tuple[float, float], draw: random.Random) -> tuple[int, int, int, int]:
    """A crop (left, top, right, bottom) of random area and aspect; centred if ten draws do not fit."""
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(*_ASPECT))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    low, high = (math.exp(bound) for bound in _ASPECT)
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _centre(have: int, want: int) -> int:
    """Where a centred crop of ``want`` pixels starts; negative where the image is smaller."""
    return round((have - want) / 2.0) if have >= want else -((want - have) // 2)


def height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """An image size as the two numbers it stands for.

    Raises:
        UserError: If it is not one positive number or two.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"The image size is {image_size}; give one positive number of pixels or (height, width).")
    return int(pair[0]), int(pair[1])
