"""From an image to a uint8 tensor as training has it; normalisation is left to the device."""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import height_width, to_rgb

__all__ = ["TrainTransform", "to_pixels", "train_transform"]

_SPARE = 1.5
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


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> uint8 tensor (3, H, W), channels last in memory, as PIL and the fast resize have them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
