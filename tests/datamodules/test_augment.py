"""Augmentation is timm's, a function of its seed, and leaves no trace; the evaluation's pixels are timm's too."""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from labelled_files import noisy_jpeg
from PIL import Image
from timm.data.transforms_factory import create_transform

from dtpvit.datamodules.augment import Augmentation
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform

POLICIES = [None, "rand-m9-mstd0.5-inc1", "original", "augmix-m3-w2", "3a"]


def picture(number=0, size=(60, 44)):
    return Image.open(io.BytesIO(noisy_jpeg(number, size))).convert("RGB")


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_are_those_that_timm_makes_of_the_same_random_numbers(policy):
    ours = Augmentation((24, 32), auto_augment=policy, interpolation="random")
    theirs = create_transform(
        (3, 24, 32), is_training=True, auto_augment=policy, color_jitter=None, interpolation="random", normalize=False
    )
    seen = set()
    for seed in range(12):
        result = ours(picture(), seed)
        assert result.dtype == torch.uint8 and result.shape == (3, 24, 32) and result.is_contiguous()
        seed_all(seed)
        try:
            expected = theirs(picture())
        except ValueError as error:  # under Pillow 13, see the next test
            assert "bits must be" in str(error)
            continue
        assert torch.equal(result, expected)
        seen.add(result.numpy().tobytes())
    assert len(seen) >= 10


@pytest.mark.parametrize("policy", ["rand-m10-n1-p1-inc1", "rand-m0-n1-p1", "v0", "augmix-m10-w2-d1"])
def test_posterizing_to_no_bits_gives_black_as_it_did_when_the_recipes_were_made(policy):
    ours = Augmentation(8, auto_augment=policy)
    results = [ours(picture(), seed) for seed in range(60)]
    if policy.startswith("rand"):
        assert any(not result.any() for result in results)
    assert sum(bool(result.any()) for result in results) > 40


@pytest.mark.parametrize("policy", POLICIES)
def test_the_global_generators_stay_as_they_were(policy):
    seed_all(5)
    expected = random.random(), np.random.rand(), torch.rand(())
    seed_all(5)
    first = Augmentation(16, auto_augment=policy, color_jitter=0.4)(picture(), 7)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected
    seed_all(99)
    assert torch.equal(Augmentation(16, auto_augment=policy, color_jitter=0.4)(picture(), 7), first)


def test_each_option_does_what_it_says():
    still = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "flip": 0}
    image = picture(size=(32, 32))
    plain = Augmentation(32, **still)(image, 1)
    assert torch.equal(plain, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(Augmentation(32, **(still | {"flip": 1}))(image, 1), plain.flip(2))
    assert torch.equal(Augmentation(32, **still, vertical_flip=1)(image, 1), plain.flip(1))
    # timm alone would leave the jitter out beside a policy.
    policy = {"auto_augment": "rand-m9-p0"}
    assert torch.equal(Augmentation(32, **still, **policy)(image, 1), plain)
    assert not torch.equal(Augmentation(32, **still, **policy, color_jitter=0.4)(image, 1), plain)
    assert not torch.equal(Augmentation(32, **still, color_jitter=[0.0, 0.0, 0.0, 0.5])(image, 1), plain)


def test_it_survives_pickling_as_workers_that_are_spawned_need():
    ours = Augmentation(16, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(picture(), 3), ours(picture(), 3))


def test_images_too_small_to_crop_are_told_apart():
    ours = Augmentation(8)
    assert not ours.fits(Image.new("RGB", (2, 2)))
    for size in ((3, 2), (1, 5), (5, 1), (3, 3)):
        assert ours.fits(Image.new("RGB", size))
        for seed in range(50):
            assert ours(Image.new("RGB", size), seed).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"auto_augment": "rand-q9"}, "no augmentation auto_augment='rand-q9'"),
        ({"auto_augment": "best"}, "no augmentation auto_augment='best'"),
        ({"crop_scale": (0.5, 0.2)}, "crop scale is"),
        ({"crop_ratio": (0, 1)}, "crop ratio is"),
        ({"flip": 2}, "flip is 2"),
        ({"color_jitter": [0.1]}, "colour jitter is"),
        ({"color_jitter": [0.1, 0.1, 0.1, 0.7]}, "hue by 0.7"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
        ({"image_size": 0}, "image size is 0"),
    ],
)
def test_impossible_settings_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        Augmentation(**({"image_size": 8} | options))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ evaluation

CONVENTIONS = [(224, 0.9, "bicubic"), (384, 1.0, "bicubic"), (224, 0.875, "bilinear"), ((96, 160), 0.95, "lanczos")]


def of_timm(image, size, crop_pct, interpolation):
    pair = (size, size) if isinstance(size, int) else size
    return create_transform((3, *pair), crop_pct=crop_pct, interpolation=interpolation, normalize=False)(image)


@pytest.mark.parametrize(("size", "crop_pct", "interpolation"), CONVENTIONS)
def test_evaluation_equals_timm_to_the_grey_level(size, crop_pct, interpolation):
    ours = eval_transform(size, crop_pct=crop_pct, interpolation=interpolation)
    for number, (width, height) in enumerate([(500, 375), (333, 500), (248, 249), (31, 200), (224, 224), (97, 96)]):
        image = picture(number, (width, height))
        assert torch.equal(ours(image), of_timm(image, size, crop_pct, interpolation)), (width, height)


@pytest.mark.parametrize(("size", "crop_pct", "interpolation"), CONVENTIONS)
def test_evaluation_equals_timm_on_photographs(shared_data, size, crop_pct, interpolation):
    files = sorted((shared_data / "imagenet_sample").glob("*.jpg"))[::100]
    assert len(files) == 10
    ours = eval_transform(size, crop_pct=crop_pct, interpolation=interpolation)
    for file in files:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
        assert torch.equal(ours(rgb), of_timm(rgb, size, crop_pct, interpolation)), file


def test_an_impossible_crop_is_refused():
    with pytest.raises(UserError, match=r"crop_pct is 1\.1"):
        eval_transform(8, crop_pct=1.1)
    with pytest.raises(UserError, match="interpolation is 'random'"):
        eval_transform(8, interpolation="random")
