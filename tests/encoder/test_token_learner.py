"""TokenLearner and TokenFuser against slow references with loops, written from the description of the method."""

import math

import pytest
import torch

from dtpvit.encoder import Layout, Tokens, VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling, Evidence, TokenLearner
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.create import create_encoder

D, M = 12, 4


def norm(layer, x):
    return (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, correction=0) + 1e-6
    ).sqrt() * layer.weight + layer.bias


def mlp(layers, x):
    hidden = x @ layers[0].weight.T + layers[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ layers[2].weight.T + (0 if layers[2].bias is None else layers[2].bias)


def convolved(layers, x, grid):
    """Logits of each place, (N, M), of convolutions that see nothing beyond the border."""
    rows, columns = grid
    for number in (0, 2, 4, 6):
        if number:
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        weight, out = layers[number].weight, []
        for place in range(rows * columns):
            row, column = divmod(place, columns)
            total = 0
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= row + i < rows and 0 <= column + j < columns:
                        total = total + weight[:, :, i + 1, j + 1] @ x[(row + i) * columns + column + j]
            out.append(total)
        x = torch.stack(out)
    return x


def slow_learn(reducer, x, size, grid=None):
    """Learned tokens of one image, the patches that went into each, and the one that weighs each token most."""
    if reducer.version == "1.0":
        weight = convolved(reducer.maps, norm(reducer.norm, x), grid).sigmoid()
    else:
        logits = mlp(reducer.maps, norm(reducer.norm, x))
        weight = logits.exp() / logits.exp().sum(0)
    learned = torch.stack([sum(weight[i, m] * x[i] for i in range(len(x))) for m in range(M)])
    share = weight / weight.sum(1, keepdim=True)
    mass = [float(sum(share[i, m].detach() * size[i] for i in range(len(x)))) for m in range(M)]
    return learned, mass, weight.argmax(1)


def slow_fuse(fuser, learned, x):
    among = norm(fuser.norm_mixed, fuser.among.weight @ norm(fuser.norm_learned, learned))
    mix = mlp(fuser.mix, norm(fuser.norm, x)).sigmoid()
    return torch.stack([x[i] + sum(mix[i, m] * among[m] for m in range(M)) for i in range(len(x))])


def reducer_of(version="1.1", **options):
    reducer = TokenLearner(D, num_tokens=M, version=version, **options).double()
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return reducer


def batch_of(lengths, grid=None, num_prefix=1):
    total, dtype = sum(lengths), torch.float64
    layout = Layout.fetched(torch.tensor(lengths), num_prefix)
    patches = Layout.fetched(torch.tensor(lengths) - num_prefix)
    size = torch.where(layout.prefix, 1.0, torch.randint(1, 5, (total,)).float())
    source = torch.cat([torch.arange(length - num_prefix) for length in lengths])
    x = torch.randn(total, D, dtype=dtype, requires_grad=True)
    return Tokens(x, layout, size, source, patches, grid)


CASES = {
    "1.1": ("1.1", [13, 13], None, 1),
    "1.1, ragged": ("1.1", [3, 12, 7, 5], None, 1),
    "1.1, fewer patches than tokens": ("1.1", [2, 3], None, 0),
    "1.1, two prefix tokens": ("1.1", [9, 4], None, 2),
    "1.0": ("1.0", [13, 13], (3, 4), 1),
    "1.0, no prefix token": ("1.0", [10, 10, 10], (5, 2), 0),
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_slow_reference_gradients_included(case, fuse):
    version, lengths, grid, num_prefix = CASES[case]
    reducer, tokens = reducer_of(version, fuse=fuse), batch_of(lengths, grid, num_prefix)
    reduction = reducer(tokens, Evidence())
    found, few = [], reduction.tokens
    assert few.lengths.tolist() == [num_prefix + M] * len(lengths) and few.key_bias is None
    for before, after in zip(tokens.split(), few.split(), strict=True):
        x = before.features
        learned, mass, named = slow_learn(reducer, x[num_prefix:], before.size[num_prefix:], grid)
        expected = torch.cat((x[:num_prefix], learned))
        torch.testing.assert_close(after.features, expected)
        assert after.size.tolist() == pytest.approx([1.0] * num_prefix + mass) and torch.equal(after.source, named)
        assert float(after.size[num_prefix:].sum()) == pytest.approx(float(before.size[num_prefix:].sum()))
        if fuse:  # as if the block had made its tokens' cosine of them
            expected = expected.cos()
            restored = slow_fuse(reducer.fuser, expected[num_prefix:], x[num_prefix:])
            expected = torch.cat((expected[:num_prefix], restored))
        found.append(expected)
    expected = torch.cat(found)
    result = reduction.restore(few.features.cos()) if fuse else few.features
    torch.testing.assert_close(result, expected)
    weight, inputs = torch.randn_like(expected), [tokens.features, *reducer.parameters()]
    one, two = (torch.autograd.grad((out * weight).sum(), inputs) for out in (result, expected))
    for mine, slow in zip(one, two, strict=True):
        torch.testing.assert_close(mine, slow)


def test_tokens_that_attention_weighs_by_size_are_weighed_by_the_maps_too():
    """A token of size 3 counts like three equal ones."""
    reducer, x = reducer_of(), torch.randn(4, D, dtype=torch.float64)
    single = Tokens.from_dense(x[[0, 0, 0, 1, 2, 3]][None])
    tokens = Tokens.from_dense(x[None])
    size = torch.tensor([3.0, 1.0, 1.0, 1.0])
    tokens = Tokens(tokens.features, tokens.layout, size, tokens.source, tokens.patches, key_bias=size.log())
    one, two = (reducer(given, Evidence()).tokens for given in (single, tokens))
    torch.testing.assert_close(one.features, two.features)
    torch.testing.assert_close(one.size, two.size)


def small(reducers=None, **options):
    sizes = {"image_size": (40, 56), "patch_size": 8, "dim": 24, "depth": 4, "num_heads": 2} | options
    return VisionEncoder(**sizes, reducers=reducers or {})


def test_a_fuser_starts_with_every_patch_token_as_it_came():
    encoder = small({2: TokenLearner(24, num_tokens=5, fuse=True)}).eval()
    tokens = encoder.embed(torch.randn(2, 3, 40, 56))
    after = encoder.run_block(2, tokens)
    patches = ~tokens.layout.prefix
    assert torch.equal(after.features[patches], tokens.features[patches])
    assert not torch.equal(after.features[~patches], tokens.features[~patches])  # the class token met what was learned
    assert after.grid == tokens.grid and torch.equal(after.size, tokens.size)


def test_a_fuser_leaves_its_start_when_trained():
    encoder = small({block: TokenLearner(24, num_tokens=5, fuse=True) for block in (2, 3)}, readout="mean").train()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    images, target = torch.randn(4, 3, 40, 56), torch.randn(4, 24)
    losses = []
    for _ in range(8):
        loss = (encoder(images).pooled - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in encoder.reducers.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_after_a_dynamic_reducer_every_image_has_as_many_tokens():
    reducers = {1: DynamicPooling(24, compression=2), 2: TokenLearner(24, num_tokens=5)}
    encoder = small(reducers).train()
    encoder(torch.randn(8, 3, 40, 56))
    encoding = encoder.eval()(torch.randn(5, 3, 40, 56))
    assert len(set(encoding.layouts[1].mlp.lengths.tolist())) > 1 and encoding.tokens.lengths.tolist() == [6] * 5
    for image in encoding.tokens.split():
        assert float(image.size[1:].sum()) == pytest.approx(35) and image.source.max() < 5


def test_counts_and_costs():
    """16 tokens behind nine of twelve blocks (Ryoo et al. 2021), and 8 halfway, which halves the compute."""
    image = torch.randn(1, 3, 224, 224)
    block = {n: 12 * n * 768**2 + 2 * n * n * 768 for n in (197, 17, 9)}
    for at, learned in ((9, 16), (6, 8)):
        config = {at: {"class_path": "TokenLearner", "init_args": {"num_tokens": learned}}}
        encoder = create_encoder("vit_base_patch16_224", reducers=config).eval()
        with torch.no_grad():
            encoding = encoder(image)
        assert encoding.tokens.lengths.tolist() == [1 + learned]
        cost = image_cost(encoder, encoding.layouts)
        maps = 196 * 64 * (768 + learned) + 196 * learned * 768
        assert float(cost.reducers) == maps
        assert float(cost.total) == maps + 196 * 768**2 + at * block[197] + (12 - at) * block[1 + learned]
        if at == 6:
            assert float(cost.total) / 17.563e9 == pytest.approx(0.52, abs=0.01)


@pytest.mark.parametrize("version", [1.0, 1.1, "1.0"])
def test_a_yaml_s_number_is_a_version(version):
    assert TokenLearner(8, num_tokens=2, version=version).version == str(version)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "at least 1"),
        ({"num_tokens": 2.5}, "whole number"),
        ({"version": "2"}, r"expected 1\.0 or 1\.1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenLearner(8, **{"num_tokens": 2, **options})


def test_convolutions_without_a_grid_are_refused():
    tokens = Tokens.from_dense(torch.randn(2, 9, 8), num_prefix=1)
    with pytest.raises(ValueError, match=r"TokenLearner 1\.0 needs tokens that form a grid"):
        TokenLearner(8, num_tokens=2, version="1.0")(tokens, Evidence())
