"""timm's training augmentation of single images, every choice of it a function of one seed; or none at all."""

from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor

from dtpvit.datamodules.seeding import seeded
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import INTERPOLATIONS, EvalTransform, height_width

__all__ = ["Augmentation", "Unaugmented"]


class Augmentation:
    """Image and seed -> uint8 tensor (3, H, W): timm's ``transforms_imagenet_train`` up to the normalisation.

    Random resized crop, flips, then RandAugment (Cubuk et al., "RandAugment: Practical automated data augmentation
    with a reduced search space", 2019), AutoAugment, AugMix or 3-Augment (Touvron et al., "DeiT III", 2022), then
    colour jitter. Random erasing, Mixup and CutMix are of whole batches, and left to the device.

    Args:
        image_size: Pixels, or (height, width).
        crop_scale: Shares of the image's area that a crop keeps, least and most.
        crop_ratio: Width by height of a crop, least and most.
        flip, vertical_flip: How often the image is mirrored.
        auto_augment: In timm's spelling: "rand-m9-mstd0.5-inc1", "original", "augmix-m3-w3", "3a"; None for none.
        color_jitter: Strength of changes of brightness, contrast and saturation, and of hue if it is the fourth number
            of a list; applied beside ``auto_augment`` too, where timm's scripts leave it out.
        interpolation: One of PIL's, or "random" (bilinear or bicubic).

    Raises:
        UserError: If a value is out of its range, or timm does not know ``auto_augment``.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        auto_augment: str | None = None,
        color_jitter: float | list[float] | None = None,
        interpolation: str = "bicubic",
    ) -> None:
        _check(crop_scale, crop_ratio, flip, vertical_flip, color_jitter, interpolation)
        self.image_size = height_width(image_size)
        # Below a quarter of a pixel timm's crop rounds to nothing.
        self._least_area = 0.25 / (crop_scale[0] * min(crop_ratio[0], 1 / crop_ratio[1]))
        try:
            self._transform = transforms_imagenet_train(
                self.image_size,
                scale=(float(crop_scale[0]), float(crop_scale[1])),
                ratio=(float(crop_ratio[0]), float(crop_ratio[1])),
                hflip=flip,
                vflip=vertical_flip,
                color_jitter=color_jitter or None,  # type: ignore[arg-type]
                force_color_jitter=True,
                auto_augment=auto_augment or None,
                interpolation=interpolation,
                normalize=False,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"timm has no augmentation auto_augment={auto_augment!r}: give a string such as "
                "'rand-m9-mstd0.5-inc1', 'original', 'augmix-m3-w3' or '3a', or none."
            ) from error
        for op in _operations(self._transform):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize

    def fits(self, image: Image.Image) -> bool:
        """Whether the image is large enough to be cropped: a few pixels are."""
        return image.width * image.height > self._least_area

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """``image`` is RGB. The global random generators are left as they were."""
        with seeded(seed):
            return self._transform(image).contiguous()  # type: ignore[union-attr]


class Unaugmented:
    """The evaluation's transform in the place of :class:`Augmentation`: the same pixels whatever the seed.

    Args:
        transform: Resize and centre crop.
    """

    def __init__(self, transform: EvalTransform) -> None:
        self._transform = transform

    def fits(self, image: Image.Image) -> bool:
        """Every image does."""
        return True

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        return self._transform(image)


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """The image operations of timm's policies, which lie in lists and lists of lists."""
    if isinstance(transform, AugmentOp):
        yield transform
    inner = transform if isinstance(transform, list) else []
    for name in ("transforms", "ops", "policy"):
        inner = inner or getattr(transform, name, [])
    for part in inner:
        yield from _operations(part)


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """timm's, but at full strength no bit is left, and Pillow, which then used to give black, raises since 13."""
    return Image.new(image.mode, image.size) if bits < 1 else posterize(image, bits)


def _check(
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    flip: float,
    vertical_flip: float,
    color_jitter: float | list[float] | None,
    interpolation: str,
) -> None:
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"The crop scale is {list(crop_scale)}; give two shares of the area, 0 < low <= high <= 1.")
    if not 0 < crop_ratio[0] <= crop_ratio[1]:
        raise UserError(f"The crop ratio is {list(crop_ratio)}; give width by height, 0 < low <= high.")
    if not 0 <= min(flip, vertical_flip) <= max(flip, vertical_flip) <= 1:
        raise UserError(f"flip is {flip} and vertical_flip {vertical_flip}; give probabilities from 0 to 1.")
    jitter = [color_jitter or 0.0] if not isinstance(color_jitter, list) else color_jitter
    if min(jitter) < 0 or (isinstance(color_jitter, list) and len(jitter) not in (3, 4)):
        raise UserError(f"The colour jitter is {color_jitter}; give one strength from 0 on, or a list of 3 or 4.")
    if len(jitter) == 4 and jitter[3] > 0.5:
        raise UserError(f"The colour jitter changes hue by {jitter[3]}; give at most 0.5, half a turn.")
    if interpolation not in (*INTERPOLATIONS, "random"):
        raise UserError(
            f"The interpolation is {interpolation!r}; choose one of {', '.join((*INTERPOLATIONS, 'random'))}."
        )
