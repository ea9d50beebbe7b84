"""H-Net's routing against a slow reference with loops, written from the description of the method."""

import pytest
import torch

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling, Evidence, RandomBoundaries

D = 12


def hnet(compression=3, **options):
    choices = {"router": "cosine", "estimator": "gate", "rate": "ratio", "rate_weight": 0.03, "temperature": 1.0}
    reducer = DynamicPooling(D, compression=compression, noise=False, order="raster", **choices, **options)
    with torch.no_grad():  # as if trained: no identities any more
        for layer in (reducer.boundary_predictor.query, reducer.boundary_predictor.key):
            layer.weight.add_(0.3 * torch.randn(D, D))
    return reducer


def slow_routing(reducer, x):
    """p_t of one image's patches, the first one 1."""
    query, key = reducer.boundary_predictor.query.weight, reducer.boundary_predictor.key.weight
    probabilities = [torch.ones(())]
    for t in range(1, len(x)):
        q, k = query @ x[t - 1], key @ x[t]
        probabilities.append(((1 - q @ k / (q.norm() * k.norm())) / 2).clamp(0, 1))
    return torch.stack(probabilities)


def slow_chunks(p, x, size):
    """Mean of each chunk times its confidence, one in value: what an encoder without decoder has of the gate."""
    starts = [t for t in range(len(x)) if p[t] > 0.5]
    rows = []
    for begin, end in zip(starts, [*starts[1:], len(x)], strict=True):
        mean = (x[begin:end] * size[begin:end, None]).sum(0) / size[begin:end].sum()
        rows.append(mean * (p[begin] + (1 - p[begin]).detach()))
    return torch.stack(rows)


def batch(ragged):
    dense = Tokens.from_dense(torch.randn(4, 31, D), num_prefix=1, grid=(5, 6), seed=torch.arange(4))
    return RandomBoundaries(D, compression=1.5).eval()(dense, Evidence()).tokens if ragged else dense


@pytest.mark.parametrize("ragged", [False, True])
def test_it_equals_the_slow_reference_gradients_included(ragged):
    reducer, tokens = hnet(), batch(ragged)
    x = tokens.features.detach().requires_grad_()
    out = reducer.train()(tokens.with_features(x), Evidence())
    rows, means = [], []
    for image, features in zip(tokens.split(), x.split(tokens.lengths.tolist()), strict=True):
        p = slow_routing(reducer, features[1:])
        means.append(p)
        rows += [features[:1], slow_chunks(p, features[1:], image.size[1:])]
    expected = torch.cat(rows)
    torch.testing.assert_close(out.tokens.features, expected)
    p = torch.cat(means)
    f, g, n = (p > 0.5).float().mean(), p.mean(), 3
    ratio = n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
    torch.testing.assert_close(out.losses["rate"], 0.03 * ratio)
    weight, wanted = torch.randn_like(expected), [x, *reducer.parameters()]
    found = torch.autograd.grad((out.tokens.features * weight).sum() + out.losses["rate"], wanted)
    slow = torch.autograd.grad((expected * weight).sum() + 0.03 * ratio, wanted)
    for one, two in zip(found, slow, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_training_decides_as_evaluation_does_without_seed_or_calibration():
    reducer, tokens = hnet(), batch(ragged=False)
    seedless = Tokens.from_dense(tokens.features.view(4, 31, D), num_prefix=1, grid=(5, 6))
    sources = [reducer.train(mode)(seedless, Evidence()).tokens.source for mode in (True, False, True)]
    assert torch.equal(sources[0], sources[1]) and torch.equal(sources[1], sources[2])
    assert reducer.draws == "never" and set(reducer.state_dict()) == {
        "boundary_predictor.query.weight",
        "boundary_predictor.key.weight",
    }


def test_identities_at_the_start():
    reducer = DynamicPooling(D, compression=3, router="cosine", estimator="gate", rate="ratio", noise=False)
    for weight in reducer.state_dict().values():
        assert torch.equal(weight, torch.eye(D))


def test_the_loss_brings_the_rate():
    """The ratio loss alone: from what the features happen to give to one token in four, in evaluation too."""
    reducer = hnet(compression=4)
    optimizer = torch.optim.Adam(reducer.parameters(), lr=3e-3)
    shared = 0.4 * torch.randn(D)  # without something in common no projection makes neighbours alike

    def draw():
        return Tokens.from_dense(torch.randn(16, 31, D) + shared, num_prefix=1, grid=(5, 6))

    def rate():
        with torch.no_grad():
            out = reducer.eval()(draw(), Evidence()).tokens
        return float((out.lengths - 1).sum()) / (16 * 30)

    assert abs(rate() - 0.25) > 0.1
    for _ in range(150):
        optimizer.zero_grad()
        reducer.train()(draw(), Evidence()).losses["rate"].backward()
        optimizer.step()
    assert abs(rate() - 0.25) < 0.1


def test_the_budget_can_be_fixed_afterwards():
    trunk = VisionEncoder(image_size=48, patch_size=8, dim=D, depth=3, num_heads=2, reducers={1: hnet()}).eval()
    images = torch.randn(6, 3, 48, 48)
    assert len(set(trunk(images).tokens.lengths.tolist())) > 1
    trunk.reducers["1"].fix_budget()
    assert set(trunk(images).tokens.lengths.tolist()) == {13}


def test_a_rate_loss_needs_a_router_that_learns():
    with pytest.raises(ValueError, match="steers what learns"):
        DynamicPooling(D, compression=3, router="entropy", estimator="gate", rate="ratio")
