"""Multiply-accumulates: the published figures, and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling, FixedStride
from dtpvit.evaluation.cost import dense_macs, image_cost, image_macs
from dtpvit.interop.create import create_clip, create_encoder


@pytest.mark.parametrize(
    ("patch", "published"), [(32, [4.409, 2.682, 1.825, 1.257]), (16, [17.563, 10.18, 6.60, 4.52])]
)
def test_pooled_models_cost_what_is_published(patch, published):
    """B/32 and B/16 at 224, class token and projection included, predictor excluded."""
    images = torch.randn(1, 3, 224, 224)
    for rate, expected in zip((1, 2, 4, 10), published, strict=True):
        trunk = create_clip(f"DTP-ViT-B-{patch}-{rate}x").visual.trunk.eval()
        with torch.no_grad():
            cost = image_cost(trunk, trunk(images).layouts, 512)
        assert float(cost.total - cost.reducers) / 1e9 == pytest.approx(expected, abs=0.005)
        assert dense_macs(trunk, 512) / 1e9 == pytest.approx(published[0], abs=0.005)
        if rate > 1:
            assert 0 < float(cost.reducers) < 0.01 * published[0] * 1e9


def test_dense_models_cost_what_is_published():
    """DeiT-Ti 1.25 G, DeiT-S 4.6 G, ViT-B/16 17.6 G, with their classifier of 1,000 classes."""
    for name, expected in (("tiny_patch16", 1.253), ("small_patch16", 4.6), ("base_patch16", 17.56)):
        encoder = create_encoder(f"vit_{name}_224")
        assert dense_macs(encoder, 1000) / 1e9 == pytest.approx(expected, abs=0.01)


def test_blocks_that_do_not_run_cost_nothing():
    shape = {"image_size": 64, "patch_size": 8, "dim": 64, "num_heads": 4}
    whole = VisionEncoder(**shape, depth=4, reducers={1: FixedStride(64, compression=2)}).eval()
    shorter = VisionEncoder(**shape, depth=3, reducers={1: FixedStride(64, compression=2)}).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, expected = whole.encode_until(3, images), shorter(images)
    assert image_macs(whole, found).tolist() == image_macs(shorter, expected).tolist()


@pytest.mark.parametrize("router", ["mlp", "cosine"])
def test_cost_equals_torch_s_counter(router):
    reducers = {1: DynamicPooling(64, compression=4, router=router), 2: DynamicPooling(64, compression=2)}
    encoder = VisionEncoder(image_size=64, patch_size=8, dim=64, depth=4, num_heads=4, reducers=reducers).eval()
    images = torch.randn(1, 3, 64, 64)
    counter = FlopCounterMode(display=False)
    # One image: no padding, and the kernel that the counter knows.
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        encoding = encoder(images)
    found = float(image_macs(encoder, encoding).sum())
    # The counter leaves out what is no matrix product: here the cosines of neighbours.
    cosines = 3 * 64 * 64 if router == "cosine" else 0
    assert 2 * (found - cosines) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_halves_of_a_block_are_counted_apart():
    """A reducer inside a block, its evidence included, against torch's counter."""
    inside = type("Inside", (FixedStride,), {"place": "inside", "needs": frozenset({"keys", "class_attention"})})
    reducers = {1: inside(64, compression=4), 2: DynamicPooling(64, compression=2), 3: inside(64, compression=2)}
    encoder = VisionEncoder(image_size=64, patch_size=8, dim=64, depth=4, num_heads=4, reducers=reducers).eval()
    images = torch.randn(1, 3, 64, 64)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        encoding = encoder(images)
    cost = image_cost(encoder, encoding.layouts)
    assert 2 * float(cost.total) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    block = 65 * 12 * 64**2 + 2 * 65**2 * 64
    assert float(cost.full_blocks) == 2 * block - 65 * 8 * 64**2  # all of block 0, the attention half of block 1
    assert float(cost.reducers) == 65 * 64 + 17 * (64 * 64 + 64) + 9 * 64


def test_images_of_unequal_length_cost_unequally():
    reducers = {1: DynamicPooling(64, compression=4)}
    encoder = VisionEncoder(image_size=64, patch_size=8, dim=64, depth=3, num_heads=4, reducers=reducers)
    encoder.train()(torch.randn(16, 3, 64, 64))
    encoding = encoder.eval()(torch.randn(16, 3, 64, 64))
    macs, lengths = image_macs(encoder, encoding), encoding.tokens.lengths
    assert torch.equal(macs.argsort(stable=True), lengths.argsort(stable=True))
