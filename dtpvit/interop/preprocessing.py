"""From a PIL image to a uint8 tensor as evaluation has it; normalisation is left to the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtpvit.errors import UserError

__all__ = [
    "INTERPOLATIONS",
    "EvalTransform",
    "ResizeMode",
    "aspect_transform",
    "eval_transform",
    "height_width",
    "normalised",
    "to_rgb",
    "to_tensor",
]

ResizeMode = Literal["shortest", "longest", "squash"]

INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)

_ASPECTS = {"pad": "longest", "crop": "shortest", "squash": "squash"}
_LONGEST_SHAPE = 64  # long side over short side
_GAP = 256.0  # a filter over more than 512 pixels first averages some: its weights for millions would take gigabytes
_WHITE = (255, 255, 255)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def eval_transform(
    image_size: int | tuple[int, int],
    *,
    resize_mode: str = "shortest",
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> "EvalTransform":
    """Resize, centre crop, RGB: open_clip's evaluation transform, without its normalisation.

    With another ``crop_pct`` it is timm's: the image is first brought to ``floor(image_size / crop_pct)``, so that
    the crop keeps that share of its short side. What ``longest`` leaves empty has the colour ``fill``.

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
    return EvalTransform(height_width(image_size), resize_mode, float(crop_pct), interpolation, fill)


@dataclass(frozen=True)
class EvalTransform:
    """PIL image -> uint8 tensor (3, H, W); nothing random. Padding is black, as open_clip's, or ``fill``."""

    image_size: tuple[int, int]
    resize_mode: str = "shortest"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, image: Image.Image) -> Tensor:
        if self.resize_mode == "shortest":
            image = _middle(image)
        image = to_rgb(image)
        height, width = self.image_size
        size = self._resized(image.width, image.height)
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()], reducing_gap=_GAP)
        left, top = _centre(image.width, width), _centre(image.height, height)
        if (left, top) != (0, 0) or image.size != (width, height):
            framed = Image.new("RGB", (width, height), self.fill)
            framed.paste(image, (-left, -top))
            image = framed
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
        values = np.asarray(image)
        if values.size and values.max() > 255:
            values = values >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, _WHITE)
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 tensor (3, H, W), contiguous."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def _middle(image: Image.Image) -> Image.Image:
    """The middle of an image that is extremely long, out of which the crop comes: the rest is not worth its memory.

    Brought to a short side of 224, a line of 60,000 pixels would take 9 GB.
    """
    most = _LONGEST_SHAPE * min(image.size)
    if max(image.size) <= most:
        return image
    width, height = min(image.width, most), min(image.height, most)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _centre(have: int, want: int) -> int:
    """Where a centred crop of ``want`` pixels starts; negative where the image is smaller."""
    return round((have - want) / 2.0) if have >= want else -((want - have) // 2)


def aspect_transform(
    image_size: int | tuple[int, int], aspect: str = "pad", fill: tuple[int, ...] = (0, 0, 0)
) -> EvalTransform:
    """How an image gets the shape of a visual language model's input.

    ``pad`` is LLaVA-1.5's (its ``expand2square``, only that the border is added after the resize): the whole image in
    its own proportions, with borders of the colour ``fill``. ``crop`` is CLIP's, ``squash`` does without proportions.

    Raises:
        UserError: If a size is not positive or ``aspect`` is none of the three.
    """
    if aspect not in _ASPECTS:
        raise UserError(f"The image aspect is {aspect!r}; choose one of {', '.join(_ASPECTS)}.")
    red, green, blue = fill
    return eval_transform(image_size, resize_mode=_ASPECTS[aspect], fill=(red, green, blue))


def height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """An image size as the two numbers it stands for.

    Raises:
        UserError: If it is not one positive number or two.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"The image size is {image_size}; give one positive number of pixels or (height, width).")
    return int(pair[0]), int(pair[1])


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images, shape (B, 3, H, W), to what a model takes: float32, by channel means and deviations on [0, 1]."""
    centre, spread = (255 * torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - centre) / spread
