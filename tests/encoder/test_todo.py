"""Keys and values from a coarser grid against a slow reference with loops, and against torch's interpolation."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.reducers import Evidence, ToDo
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.create import create_encoder

METHODS = ("downsample", "max_pool", "avg_pool")


def small(reducers=None, **options):
    sizes = {"image_size": (40, 56), "patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2} | options
    encoder = VisionEncoder(**sizes, reducers=reducers or {})
    with torch.no_grad():  # attention that is not uniform
        for block in encoder.blocks:
            block.attn.qkv.weight.mul_(4)
    return encoder


def slow_keys(x, grid, factor, method):
    """Keys of one image without the class token, and the tokens of each one's cell."""
    (rows, columns), found, cells = grid, [], []
    high, wide = rows // factor, columns // factor
    for top in range(high):
        for left in range(wide):
            cell = [i * columns + j for i in range(rows) for j in range(columns)]
            cell = [p for p in cell if (p // columns * high // rows, p % columns * wide // columns) == (top, left)]
            middle = int((top + 0.5) * rows / high) * columns + int((left + 0.5) * columns / wide)
            inside = torch.stack([x[p] for p in cell])
            found.append({"downsample": x[middle], "max_pool": inside.amax(0), "avg_pool": inside.mean(0)}[method])
            cells.append(cell)
    return found, cells


def slow_encode(encoder, image, factor, method, proportional):
    x = encoder.embed(image[None]).features
    for block in encoder.blocks:
        normed = block.norm1(x)
        keys, cells = slow_keys(normed[1:], encoder.grid_size, factor, method)
        keys, heads = torch.stack([normed[0], *keys]), block.attn.num_heads
        bias = torch.tensor([1.0, *map(len, cells)]).log() * proportional
        q = block.attn.qkv(normed)[:, :24].view(len(x), heads, -1)
        k, v = block.attn.qkv(keys)[:, 24:].view(len(keys), 2, heads, -1).unbind(1)
        mixed = [((q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5) + bias).softmax(-1) @ v[:, h] for h in range(heads)]
        x = x + block.attn.proj(torch.cat(mixed, dim=1))
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("factor", "proportional"), [(1, False), (2, False), (2, True), (3, False), (5, True)])
def test_it_equals_the_slow_reference_gradients_included(factor, method, proportional):
    """A grid of 5 by 7, which no factor divides."""
    options = {"factor": factor, "method": method, "proportional": proportional}
    encoder = small({block: ToDo(24, **options) for block in (0, 1)}).double().train()
    images = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    encoding = encoder(images)
    found = encoding.tokens.features
    expected = torch.cat([slow_encode(encoder, image, factor, method, proportional) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weight, parameters = torch.randn_like(found), list(encoder.parameters())
    one, two = (torch.autograd.grad((out * weight).sum(), parameters) for out in (found, expected))
    for mine, slow in zip(one, two, strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-5, atol=1e-5)  # shares of a mean are float32
    assert encoding.tokens.grid == (5, 7) and encoding.tokens.lengths.tolist() == [36] * 3


@pytest.mark.parametrize("grid", [(14, 14), (15, 10), (24, 7), (32, 37)])
@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_keys_are_those_of_torch(grid, factor):
    """``nearest-exact`` on any grid; the pools where the factor divides it."""
    x = torch.randn(2, 8, *grid)
    tokens = Tokens.from_dense(x.flatten(2).transpose(1, 2), grid=grid)
    coarse = (grid[0] // factor, grid[1] // factor)
    pools = {"downsample": interpolate(x, size=coarse, mode="nearest-exact")}
    if not grid[0] % factor and not grid[1] % factor:
        pools |= {"max_pool": max_pool2d(x, factor), "avg_pool": avg_pool2d(x, factor)}
    for method, expected in pools.items():
        keys = ToDo(8, factor=factor, method=method)(tokens, Evidence()).tokens
        torch.testing.assert_close(keys.features.view(2, -1, 8), expected.flatten(2).transpose(1, 2))
        assert keys.size.sum() == 2 * grid[0] * grid[1]


def test_a_factor_of_one_is_the_dense_encoder():
    encoder, dense = small({b: ToDo(24, factor=1) for b in (0, 1)}).eval(), small().eval()
    dense.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 40, 56)
    torch.testing.assert_close(encoder(images).tokens.features, dense(images).tokens.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_constant_images_pass_as_through_the_dense_encoder_if_weighed(method):
    encoder, dense = small({b: ToDo(24, method=method, proportional=True) for b in (0, 1)}), small()
    with torch.no_grad():
        encoder.pos_embed.zero_()
    dense.load_state_dict(encoder.state_dict())
    image = torch.full((1, 3, 40, 56), 0.3)
    with torch.no_grad():
        expected = dense(image).tokens.features
        torch.testing.assert_close(encoder(image).tokens.features, expected, rtol=1e-5, atol=1e-5)


def test_counts_and_costs():
    """METHODS that save keys and values save little of a ViT at 224 pixels: 15 % of ViT-B/16 at a factor of 2."""
    config = {"0-11": {"class_path": "ToDo"}}
    encoder = create_encoder("vit_base_patch16_224", reducers=config).eval()
    with torch.no_grad():
        encoding = encoder(torch.randn(1, 3, 224, 224))
    assert [(b.attention.longest, b.keys.longest, b.mlp.longest) for b in encoding.layouts] == [(197, 50, 197)] * 12
    cost = image_cost(encoder, encoding.layouts)
    block = 2 * (197 + 50) * 768**2 + 2 * 197 * 50 * 768 + 8 * 197 * 768**2
    assert float(cost.total) == 12 * block + 196 * 768**2 and float(cost.reducers) == 0
    assert 1 - float(cost.total) / 17.563e9 == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"factor": 0}, "at least 1"), ({"factor": 1.5}, "whole number"), ({"method": "x"}, "one of")],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ToDo(8, **options)


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="keys on a coarser grid need tokens that form one"):
        ToDo(8)(Tokens.from_dense(torch.randn(2, 9, 8), num_prefix=1), Evidence())
