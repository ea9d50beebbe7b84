"""Pixels in, pixels out: equal to open_clip where it must be, a function of the seed where it is random."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image
from shard_files import shared

from dtpvit.datamodules.transforms import to_pixels, train_transform
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform, to_rgb

NO_MEAN, UNIT_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def picture(width, height, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def of_open_clip(image, size, mode):
    transform = image_transform(size, is_train=False, mean=NO_MEAN, std=UNIT_STD, resize_mode=mode)
    return (transform(image) * 255).round().to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(8, 90),
    height=st.integers(8, 90),
    size=st.sampled_from([32, 37, (24, 40), (40, 24)]),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
)
def test_evaluation_equals_open_clip_bit_for_bit(width, height, size, mode):
    image = picture(width, height)
    result = eval_transform(size, resize_mode=mode)(image)
    assert result.dtype == torch.uint8 and result.is_contiguous()
    assert torch.equal(result, of_open_clip(image, size, mode))


def test_evaluation_equals_open_clip_on_photographs():
    files = sorted(shared("imagenet_sample").glob("*.jpg"))[:12]
    assert files
    for file in files:
        with Image.open(file) as image:
            assert torch.equal(eval_transform(224)(image), of_open_clip(image, 224, "shortest"))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "1", "YCbCr"])
def test_other_modes_become_what_pil_makes_of_them(mode):
    image = picture(30, 20).convert(mode)
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


def test_transparency_shows_white():
    image = picture(8, 8).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.array([0] * 4 + [255] * 4, dtype=np.uint8), (8, 1))))
    pixels = np.asarray(to_rgb(image))
    assert (pixels[:, :4] == 255).all()
    assert np.array_equal(pixels[:, 4:], np.asarray(picture(8, 8))[:, 4:])
    grey = Image.new("LA", (2, 2), (10, 0))
    assert to_rgb(grey).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([9] * 768)
    palette.info["transparency"] = 3
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0], ramp >> 8)


def test_training_depends_on_image_and_seed_alone():
    transform, image = train_transform(32, scale=(0.3, 1.0), flip=True), picture(50, 40)
    first = transform(image, seed=5)
    torch.manual_seed(1)
    assert torch.equal(first, transform(image, seed=5))
    others = [transform(image, seed=seed) for seed in range(20)]
    assert len({other.numpy().tobytes() for other in others}) == 20
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8 and first.is_contiguous()


def test_training_takes_pixels_for_an_image():
    transform, image = train_transform(32, scale=(0.3, 1.0), flip=True), picture(50, 40)
    pixels = to_pixels(image)
    assert pixels.shape == (3, 40, 50)
    for seed in range(10):
        assert torch.equal(transform(pixels, seed=seed), transform(image, seed=seed))
        assert torch.equal(transform(pixels.contiguous(), seed=seed), transform(image, seed=seed))


def test_without_a_seed_torch_draws():
    transform, image = train_transform(16, scale=(0.3, 1.0)), picture(50, 40)
    torch.manual_seed(3)
    drawn = [transform(image) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(drawn[0], transform(image)) and not torch.equal(drawn[0], drawn[1])


def test_a_whole_crop_of_the_right_size_changes_nothing():
    image = picture(32, 32)
    transform = train_transform(32, scale=(1.0, 1.0))
    kept = [torch.equal(transform(image, seed=seed), eval_transform(32)(image)) for seed in range(10)]
    assert all(kept)


def test_flip_mirrors_half_of_the_images():
    image = picture(16, 16)
    transform, plain = train_transform(16, scale=(1.0, 1.0), flip=True), eval_transform(16)(image)
    flipped = 0
    for seed in range(200):
        result = transform(image, seed=seed)
        mirrored = torch.equal(result, plain.flip(2))
        assert mirrored or torch.equal(result, plain)
        flipped += mirrored
    assert 70 < flipped < 130


def test_crops_keep_the_share_asked_for():
    """Each pixel of a ramp says where it came from, so the crop's width and height can be read off."""
    ramp = np.zeros((200, 200, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(200)[:, None]
    shares = []
    for seed in range(100):
        crop = train_transform(64, scale=(0.5, 0.6))(Image.fromarray(ramp), seed=seed).float()
        width, height = (crop[0].max() - crop[0].min()).item(), (crop[1].max() - crop[1].min()).item()
        shares.append((width + 1) * (height + 1) / 200**2)
        assert 0.70 < (width + 1) / (height + 1) < 1.42
    assert 0.47 < min(shares) < 0.53 and 0.57 < max(shares) < 0.63


def test_the_training_filter_is_pils_to_two_grey_levels():
    image = picture(12, 10).resize((60, 48), Image.Resampling.BICUBIC)
    # Of this share and aspect only the whole image can be cut out.
    mine = train_transform((32, 40), scale=(1.0, 1.0))(image, seed=2).int()
    pil = np.asarray(image.resize((40, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (mine - torch.from_numpy(pil.astype(np.int32))).abs().max() <= 2


def test_extreme_aspects_still_give_a_crop():
    for size in ((300, 3), (3, 300), (1, 1)):
        assert train_transform(8)(picture(*size), seed=0).shape == (3, 8, 8)
        assert eval_transform(8)(picture(*size)).shape == (3, 8, 8)


def test_senseless_arguments_are_refused():
    with pytest.raises(UserError, match="crop scale"):
        train_transform(8, scale=(0.0, 1.0))
    with pytest.raises(UserError, match="image size is 0"):
        eval_transform(0)
    with pytest.raises(UserError, match="choose one of shortest, longest, squash"):
        eval_transform(8, resize_mode="crop")
