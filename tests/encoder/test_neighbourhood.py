"""Neighbourhood attention against slow loops, and the encoder made of it."""

import importlib.util

import pytest
import torch

from dtpvit.encoder import Layout, NeighbourhoodEncoder, layers
from dtpvit.encoder.layers import Attention, NeighbourhoodAttention
from dtpvit.encoder.ops import neighbourhood
from dtpvit.encoder.ops.neighbourhood import neighbourhood_attention
from dtpvit.evaluation.cost import counted_macs


def slow_neighbours(place, side, kernel, dilation):
    """The ``kernel`` places of the same remainder that lie around ``place``, shifted inwards at the ends."""
    alike = [other for other in range(side) if other % dilation == place % dilation]
    at = alike.index(place)
    first = at - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > len(alike):
        first -= 1
    return alike[first : first + kernel]


def slow_attention(qkv, grid, kernel, dilation, position_bias, key_bias):
    """One image, (N, 3, H, E): each query and head on its own."""
    out = torch.zeros_like(qkv[:, 0])
    for row in range(grid[0]):
        for column in range(grid[1]):
            rows = slow_neighbours(row, grid[0], kernel[0], dilation[0])
            columns = slow_neighbours(column, grid[1], kernel[1], dilation[1])
            me = row * grid[1] + column
            for head in range(qkv.shape[2]):
                logits, values = [], []
                for down in rows:
                    for across in columns:
                        key = down * grid[1] + across
                        logit = qkv[me, 0, head] @ qkv[key, 1, head] / qkv.shape[-1] ** 0.5
                        if position_bias is not None:
                            y, x = (down - row) // dilation[0], (across - column) // dilation[1]
                            logit = logit + position_bias[head, y + kernel[0] - 1, x + kernel[1] - 1]
                        if key_bias is not None:
                            logit = logit + key_bias[key]
                        logits.append(logit)
                        values.append(qkv[key, 2, head])
                out[me, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("tile", [1, 2, 7])
@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"),
    [((5, 6), (3, 3), (1, 1)), ((9, 7), (3, 5), (2, 1)), ((3, 4), (3, 4), (1, 1)), ((3, 6), (3, 5), (1, 1))],
    ids=["square", "dilated", "all", "all down"],
)
@pytest.mark.parametrize("biased", [(False, False), (True, False), (False, True), (True, True)])
def test_it_equals_slow_loops_gradients_included(grid, kernel, dilation, biased, tile, monkeypatch):
    monkeypatch.setattr(neighbourhood, "_TILE", tile)
    cells = grid[0] * grid[1]
    qkv = torch.randn(2 * cells, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, 2 * kernel[0] - 1, 2 * kernel[1] - 1, dtype=torch.float64, requires_grad=True)
    position_bias, key_bias = (table if biased[0] else None), (torch.randn(2 * cells) if biased[1] else None)
    found = neighbourhood_attention(qkv, grid, kernel, dilation, position_bias=position_bias, key_bias=key_bias)
    expected = torch.cat(
        [
            slow_attention(
                qkv[part], grid, kernel, dilation, position_bias, None if key_bias is None else key_bias[part]
            )
            for part in (slice(0, cells), slice(cells, None))
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weight, leaves = torch.randn_like(found), [qkv] + [table] * biased[0]
    grads = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_a_window_of_the_whole_grid_is_dense_attention():
    dense, near = Attention(16, num_heads=2), NeighbourhoodAttention(16, num_heads=2, grid=(4, 6))
    near.load_state_dict({**dense.state_dict(), "position_bias": torch.zeros_like(near.position_bias)})
    x, layout = torch.randn(3 * 24, 16), Layout.uniform_of(3, 24, 0, torch.device("cpu"))
    torch.testing.assert_close(near(x, layout)[0], dense(x, layout)[0])
    tokens = torch.tensor(24.0)
    assert near.macs(tokens) == dense.macs(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel_size": 4}, "odd"), ({"kernel_size": 3, "dilation": 3}, "3 neighbours at dilation 3 do not fit")],
)
def test_neighbourhoods_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeighbourhoodAttention(16, num_heads=2, grid=(8, 8), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NATTEN's kernels need a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("natten") is None, reason="NATTEN is not installed")
@pytest.mark.parametrize("dilation", [1, 2])
def test_natten_s_kernel_agrees(dilation, monkeypatch):
    qkv = torch.randn(2 * 14 * 14, 3, 2, 32, device="cuda", dtype=torch.float16)
    arguments = qkv, (14, 14), (7, 7), (dilation, dilation)
    found = neighbourhood_attention(*arguments)
    monkeypatch.setattr(neighbourhood, "_natten", lambda: None)
    torch.testing.assert_close(found, neighbourhood_attention(*arguments), rtol=1e-2, atol=1e-2)


def small(**options):
    sizes = {"image_size": 64, "dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "kernel_size": 3}
    return NeighbourhoodEncoder(**(sizes | options))


MERGING = {
    "convolution": None,
    "inside": {},
    "after": {"place": "after"},
    "two rounds": {"matching": "two_rounds"},
    "parts": {"matching": "parts", "proportional": False},
    "published": {"by_size": False, "proportional": False},
}


@pytest.fixture(params=MERGING)
def merging(request):
    return MERGING[request.param]


def test_an_image_is_independent_of_its_batch_and_two_passes_agree(merging):
    encoder = small(merging=merging).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        together, again = encoder(images), encoder(images)
        assert torch.equal(together.pooled, again.pooled)
        for index, tokens in enumerate(together.tokens.split()):
            alone = encoder(images[index : index + 1])
            torch.testing.assert_close(alone.pooled[0], together.pooled[index], rtol=1e-5, atol=1e-5)
            assert torch.equal(alone.tokens.source, tokens.source) and torch.equal(alone.tokens.size, tokens.size)


def test_patches_are_conserved_and_every_parameter_learns(merging):
    encoder = small(merging=merging, layer_scale=0.1, drop_path=0.1)
    encoding = encoder(torch.randn(6, 3, 64, 64))
    assert encoding.tokens.lengths.tolist() == [16] * 6 and encoding.tokens.grid == (4, 4)
    alike = merging is not None and not merging.get("by_size", True)
    for tokens in encoding.tokens.split():
        members = torch.bincount(tokens.source, minlength=16).float()
        assert torch.equal(torch.full((16,), 16.0) if alike else members, tokens.size)
        assert tokens.size.sum() == members.sum() == 256
    (encoding.pooled * torch.randn_like(encoding.pooled)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_as_published_the_read_out_is_the_plain_mean_and_no_attention_has_a_bias(monkeypatch):
    """Hence NATTEN's kernel, which takes none, is asked for wherever the neighbourhood is not the whole grid."""
    encoder = small(merging=MERGING["published"], position_bias=False).eval()
    biases, inner = [], layers.neighbourhood_attention

    def spy(*arguments, **options):
        biases.extend(options.values())
        return inner(*arguments, **options)

    monkeypatch.setattr(layers, "neighbourhood_attention", spy)
    encoding = encoder(torch.randn(2, 3, 64, 64))
    assert biases == [None] * 8  # two a block
    expected = encoding.tokens.features.view(2, 16, -1).mean(1)
    torch.testing.assert_close(encoding.pooled, expected)


def test_targets_follow_from_the_seed_of_each_image_in_training():
    encoder = small(merging={}).train()
    assert encoder.needs_seed and not encoder.eval().needs_seed
    encoder.train()
    images, seeds = torch.randn(3, 3, 64, 64), torch.tensor([5, 6, 7])
    first, again = (encoder(images, seeds=seeds).tokens.source for _ in range(2))
    other = encoder(images, seeds=seeds + 10).tokens.source
    assert torch.equal(first, again) and not torch.equal(first, other)
    alone = encoder(images[1:2], seeds=seeds[1:2]).tokens.source
    assert torch.equal(alone, first[256:512])


@pytest.mark.parametrize("backward", [False, True])
def test_cost_equals_torch_s_counter(merging, backward, monkeypatch):
    """One query a tile: no logit is computed that a mask then takes away."""
    monkeypatch.setattr(neighbourhood, "_TILE", 1)
    encoder = small(merging=merging, dilations=((1,), (1, 2), (1,))).eval()
    images = torch.randn(1, 3, 64, 64)
    cost = encoder.cost(encoder(images).layouts)
    found = float((cost.training if backward else cost.total).sum())

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(x).pooled

    counted = counted_macs(Pooled(), images, backward=backward)
    if backward and merging is not None:  # no gradient flows through the matching
        counted += 2 * (float(cost.reducers.sum()) - sum(map(widening, encoder.levels)))
    assert found == pytest.approx(counted, rel=1e-9)
    if merging is None:
        assert encoder.dense_macs() == float(cost.total)


def widening(level):
    """MACs of the MLP to the next width, on the merged tokens."""
    cells = level.blocks[0].attn.grid[0] * level.blocks[0].attn.grid[1] / 4
    return 0.0 if level.transition is None else float(level.transition.widen.macs(torch.tensor(cells)))


def test_nat_mini_has_the_published_size():
    """20.0 M parameters with 1,000 classes and 2.7 GMACs (Hassani et al., table 4)."""
    encoder = NeighbourhoodEncoder()
    assert sum(p.numel() for p in encoder.parameters()) + 513_000 == pytest.approx(20.0e6, abs=0.05e6)
    assert encoder.dense_macs() / 1e9 == pytest.approx(2.7, abs=0.05)


def test_checkpointed_blocks_give_the_same_gradients():
    encoder, images = small(merging={"proportional": True}), torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        encoder(images, seeds=torch.tensor([1, 2])).pooled.square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_mixed_precision_is_close_to_float32(merging):
    encoder, images = small(merging=merging).eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(images).pooled
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = encoder(images).pooled.float()
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "expected a number of heads for each level"),
        ({"image_size": 30}, "not a multiple of the patch size 4"),
        ({"merging": {"place": "before"}}, "expected inside or after"),
        ({"merging": {"matching": "best"}}, "expected one of random, two_rounds, parts"),
        ({"merging": {"window": 1}}, "merges nothing"),
        ({"readout": "class"}, "expected mean"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="images are 32x32, the encoder was made for 64x64"):
        small()(torch.randn(1, 3, 32, 32))


def test_training_after_an_evaluation_in_inference_mode():
    """Tables are kept from call to call, and that mode's tensors cannot be saved for the backward pass."""
    sizes = {"image_size": 40, "dim": 8, "depths": (1, 1), "num_heads": (1, 2), "kernel_size": 3}  # a grid of its own
    model = NeighbourhoodEncoder(**sizes).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        model(images)
    model.train()(images).pooled.sum().backward()
