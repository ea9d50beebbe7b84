"""Entropy of pixels, boundaries where it rises, and what it teaches; against loops."""

import math
from collections import Counter

import pytest
import torch

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.ops.entropy import pixel_entropy
from dtpvit.encoder.reducers import DynamicPooling, Evidence, RandomBoundaries, ToMe
from dtpvit.encoder.reducers.routers import entropy_rise


def pictures(batch, rows, columns):
    """8-bit images, part plain and part busy, each channel from 0 to 255, as floats from 0 to 1."""
    contrast = torch.nn.functional.interpolate(torch.rand(batch, 3, 3, 2), size=(rows, columns)).pow(3)
    images = (255 * contrast * torch.rand(batch, 3, rows, columns)).round()
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 255
    return images / 255


def slow_entropy(image, top, left, side):
    low, high = image.amin((1, 2)).tolist(), image.amax((1, 2)).tolist()
    levels = Counter()
    for row in range(top, top + side):
        for column in range(left, left + side):
            spread = [(float(image[c, row, column]) - low[c]) / (high[c] - low[c]) for c in range(3)]
            levels[round(511 * sum(spread) / 3)] += 1
    return -sum(n / side**2 * math.log2(n / side**2) for n in levels.values())


def test_it_equals_loops():
    images = pictures(2, 20, 24)  # 5 x 6 patches of 4 pixels
    found = pixel_entropy(images, 4).view(2, 5, 6, 3)
    for index, image in enumerate(images):
        for row in range(5):
            for column in range(6):
                for level, side in enumerate((1, 2, 4)):
                    top, left = row // side * side, column // side * side
                    inside = top + side <= 5 and left + side <= 6
                    expected = slow_entropy(image, 4 * top, 4 * left, 4 * side) if inside else math.inf
                    assert float(found[index, row, column, level]) == pytest.approx(expected, abs=1e-5)


def test_normalisation_and_batch_do_not_matter():
    images = pictures(3, 32, 32)
    expected = pixel_entropy(images, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixel_entropy((images - mean.view(3, 1, 1)) / std.view(3, 1, 1), 8), expected)
    torch.testing.assert_close(pixel_entropy(255 * images, 8), expected)
    assert torch.equal(torch.cat([pixel_entropy(image[None], 8) for image in images]), expected)


def test_plain_is_zero_and_noise_is_high():
    images = torch.full((1, 3, 32, 32), 0.7)
    assert pixel_entropy(images, 16)[:, :2].abs().max() < 1e-5
    images[:, :, 16:] = torch.rand(1, 3, 16, 32)
    top, bottom = pixel_entropy(images, 16)[:, 0].view(2, 2)
    assert top.max() < 1e-5 and bottom.min() > 6.5


@pytest.mark.parametrize("ragged", [False, True])
def test_boundaries_are_where_the_entropy_rises_over_the_two_places_before(ragged):
    images = pictures(3, 40, 48)
    tokens = Tokens.from_dense(
        torch.randn(3, 31, 8),
        num_prefix=1,
        grid=(5, 6),
        seed=torch.arange(3),
        pixel_entropy=pixel_entropy(images, 8),
    )
    tokens = RandomBoundaries(8, compression=1.5).eval()(tokens, Evidence()).tokens if ragged else tokens
    reducer = DynamicPooling(8, compression=4, router="entropy", budget="fixed", order="serpentine").eval()
    out = reducer(tokens, Evidence()).tokens
    line = list(range(30)) if ragged else [6 * r + (c if r % 2 == 0 else 5 - c) for r in range(5) for c in range(6)]
    for before, after in zip(tokens.split(), out.split(), strict=True):
        count = len(before.size) - 1
        members = [[p for p in range(30) if before.source[p] == place] for place in range(count)]
        entropy = [sum(float(before.pixel_entropy[p, 0]) for p in group) / len(group) for group in members]
        entropy = [entropy[place] for place in line[:count]]
        rise = [entropy[t] - max(entropy[max(0, t - 2) : t]) for t in range(1, count)]
        starts = sorted(range(1, count), key=lambda t: -rise[t - 1])[: math.ceil(count / 4) - 1]
        segment = 0
        for t in range(count):
            segment += t in starts
            assert all(after.source[patch] == segment for patch in members[line[t]])
        assert len(after.size) == 1 + math.ceil(count / 4)


def test_the_teacher_s_segments_are_those_of_the_rises():
    images = pictures(4, 48, 48)
    options = {"estimator": "imitation", "order": "raster", "compression": 3}
    taught = DynamicPooling(24, teacher="entropy", **options)
    direct = DynamicPooling(24, compression=3, router="entropy", budget="fixed", order="raster")
    trunk = VisionEncoder(image_size=48, patch_size=8, dim=24, depth=2, num_heads=2, reducers={1: taught}).train()
    tokens = trunk.embed(images)
    found, expected = taught(tokens, Evidence()), direct.eval()(tokens, Evidence())
    assert torch.equal(found.tokens.source, expected.tokens.source)
    starts = torch.cat([torch.cat((image.source.new_ones(1), image.source.diff())) for image in found.tokens.split()])
    probability = torch.sigmoid(taught.boundary_predictor(tokens, None, torch.tensor([12] * 4), 12)).view(4, 37)[:, 1:]
    chosen = torch.where(starts.view(4, 36) == 1, probability, 1 - probability)
    torch.testing.assert_close(found.losses["imitation"], -chosen[:, 1:].log().mean())


def test_entropies_are_computed_only_where_they_are_needed():
    def trunk(*reducers, inside=False):
        made = {block: reducer for block, reducer in enumerate(reducers)}
        return VisionEncoder(image_size=48, patch_size=8, dim=24, depth=2, num_heads=2, reducers=made)

    images = torch.randn(2, 3, 48, 48)
    by_pixels = DynamicPooling(24, compression=2, router="entropy")
    assert trunk(ToMe(24, r=2), by_pixels).embed(images).pixel_entropy.shape == (2 * 36, 3)
    assert trunk(ToMe(24, r=2)).embed(images).pixel_entropy is None
    taught = trunk(DynamicPooling(24, compression=2, estimator="imitation", teacher="entropy"))
    assert taught.train().embed(images).pixel_entropy is not None  # the pupil needs no teacher any more
    assert taught.eval().embed(images).pixel_entropy is None
    with pytest.raises(ValueError, match=r"need tokens\.pixel_entropy"):
        by_pixels(Tokens.from_dense(torch.randn(2, 7, 24), num_prefix=1), Evidence())


def test_the_rise_at_the_first_places():
    entropy = torch.tensor([5.0, 1.0, 3.0, 4.0]).repeat(2)[:, None].expand(-1, 3)
    tokens = Tokens.from_dense(torch.randn(2, 5, 8), num_prefix=1, pixel_entropy=entropy)
    assert entropy_rise(tokens, None).tolist() == [0, 0, -4, -2, 1] * 2


def test_an_unknown_teacher_is_refused():
    with pytest.raises(ValueError, match="expected variance or entropy"):
        DynamicPooling(8, compression=2, teacher="oracle")
