"""What only a GPU can show: the variable-length kernel, and the same decisions as on the CPU."""

import copy

import pytest
import torch

from dtpvit.encoder import DualEncoder, Layout, VisionEncoder, VisualTower
from dtpvit.encoder.ops.attention import packed_attention
from dtpvit.encoder.reducers import DynamicPooling, GridPooling, RandomBoundaries

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dim", [32, 50, 64])
@pytest.mark.parametrize(("with_bias", "causal"), [(False, False), (True, False), (False, True)])
def test_kernel_equals_padding(dim, with_bias, causal):
    lengths = torch.tensor([3, 17, 1, 50], device="cuda")
    layout = Layout.fetched(lengths)
    inputs = [torch.randn(71, 4, dim, device="cuda") for _ in range(3)]
    half = [x.bfloat16().requires_grad_() for x in inputs]
    full = [x.detach().float().requires_grad_() for x in half]
    bias = torch.randint(1, 200, (71,), device="cuda").float().log() if with_bias else None
    found = packed_attention(torch.stack(half, dim=1), layout, key_bias=bias, causal=causal)
    expected = packed_attention(torch.stack(full, dim=1), layout, key_bias=bias, causal=causal)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(expected)
    (found.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(half, full, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("reducer", [DynamicPooling, RandomBoundaries])
def test_cuda_decides_like_the_cpu(reducer):
    encoder = VisionEncoder(
        image_size=64, patch_size=8, dim=64, depth=4, num_heads=4, reducers={1: reducer(64, compression=4)}
    )
    images, seeds = torch.randn(16, 3, 64, 64), torch.arange(16)
    other = copy.deepcopy(encoder).cuda()
    for mode in (True, False):
        here = encoder.train(mode)(images, seeds=seeds)
        there = other.train(mode)(images.cuda(), seeds=seeds.cuda())
        same = (there.tokens.source.cpu() == here.tokens.source).double().mean()
        assert same > 0.99


def test_a_training_step_in_bfloat16_reaches_every_parameter():
    reducers = {0: GridPooling(64), 1: DynamicPooling(64, compression=4)}
    trunk = VisionEncoder(image_size=64, patch_size=4, dim=64, depth=3, num_heads=4, reducers=reducers)
    clip = DualEncoder(VisualTower(trunk, 32), 32, text={"width": 64, "heads": 4, "layers": 2}).cuda().train()
    text = torch.zeros(8, 77, dtype=torch.int64, device="cuda")
    text[torch.arange(8), torch.arange(8) + 3] = 49407
    with torch.autocast("cuda", dtype=torch.bfloat16):
        image_features, text_features, scale = clip(torch.randn(8, 3, 64, 64, device="cuda"), text)
    logits = scale * image_features.float() @ text_features.float().T
    torch.nn.functional.cross_entropy(logits, torch.arange(8, device="cuda")).backward()
    missing = [n for n, p in clip.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_two_passes_are_equal_to_the_last_bit():
    encoder = VisionEncoder(
        image_size=64, patch_size=8, dim=64, depth=4, num_heads=4, reducers={1: DynamicPooling(64, compression=4)}
    ).cuda()
    images = torch.randn(16, 3, 64, 64, device="cuda")
    encoder.train()(images)
    encoder.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(encoder(images).pooled, encoder(images).pooled)
