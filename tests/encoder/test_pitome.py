"""PiToMe against a slow reference with loops, written from the description of the method."""

import math

import pytest
import torch
from slow_merging import assert_equals_slow_reference, assert_merges_like, cosine, random_tokens, small

from dtpvit.encoder.reducers import Evidence, PiToMe
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.create import create_encoder


def slow_matching(r=None, ratio=None, margin=0.5, protect=True):
    """Pairs (a, b) that are merged, and the order of all, which stays."""

    def match(keys, num_prefix):
        places = list(range(num_prefix, len(keys)))
        wished = r if ratio is None else math.floor(len(places) - ratio * len(places))
        merges = min(wished, len(places) // 2)
        energy = {}
        for i in places:
            above = [cosine(keys[i], keys[j]) - margin for j in places]
            energy[i] = sum(x if x > 0 else math.exp(x) - 1 for x in above) / len(places)
        ranked = sorted(places, key=lambda i: -energy[i])
        ranked = ranked[: 2 * merges] if protect else ranked
        found = []
        for a in ranked[::2]:
            partner = max(ranked[1::2], key=lambda b: cosine(keys[a], keys[b]), default=None)
            if partner is not None:
                found.append((cosine(keys[a], keys[partner]), a, partner))
        found.sort(key=lambda edge: -edge[0])
        return [(a, b) for _, a, b in found[:merges]], range(len(keys))

    return match


@pytest.mark.parametrize(
    "options",
    [
        [{"r": 5}, {"r": 6, "margin": 0.9}, {"r": 3, "margin": -0.5}],
        [{"r": 7, "protect": False}, {"r": 0}, {"ratio": 0.7}],
        [{"r": 40}, {"r": 40, "protect": False}, {"ratio": 0.5, "protect": False}],
    ],
    ids=["constant", "mixed", "saturated"],
)
@pytest.mark.parametrize("training", [False, True])
def test_it_equals_the_slow_reference_gradients_included(options, training):
    encoder = small({block: PiToMe(24, **given) for block, given in enumerate(options)}).double().train(training)
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    assert_equals_slow_reference(encoder, images, [slow_matching(**given) for given in options])


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("lengths", [[9, 9], [3, 12, 7, 4], [3]])
@pytest.mark.parametrize("options", [{"r": 3}, {"r": 2, "protect": False}, {"ratio": 0.6}])
def test_any_prefix_and_any_lengths(num_prefix, lengths, options):
    tokens, keys = random_tokens(lengths, num_prefix)
    assert_merges_like(PiToMe(6, **options), slow_matching(**options), tokens, keys)


def test_isolated_tokens_are_protected():
    """Twelve patches of one colour with little noise, four unlike anything: only the former are merged."""
    tokens, _ = random_tokens([17], 1)
    keys = torch.cat((torch.zeros(1, 16), torch.eye(16)[0] + 0.05 * torch.randn(12, 16), torch.eye(16)[1:5]))
    found = PiToMe(6, r=5)(tokens, Evidence(keys=keys)).tokens
    assert torch.bincount(found.source)[found.source][12:].tolist() == [1, 1, 1, 1]


def test_counts_and_costs():
    """r = 13 as of ToMe, 197 to 41 tokens; the published share of 0.9 keeps 59 patches of 196."""
    image = torch.randn(1, 3, 224, 224)
    expected = {}
    for name, arguments in (("r", {"r": 13}), ("ratio", {"ratio": 0.9})):
        reducers = {"0-11": {"class_path": "PiToMe", "init_args": arguments}}
        encoder = create_encoder("vit_tiny_patch16_224", reducers=reducers).eval()
        with torch.no_grad():
            encoding = encoder(image)
        cost = image_cost(encoder, encoding.layouts)
        expected[name] = float(cost.total - cost.reducers) / 1e9
        patches, count = [196], 0
        for _ in range(12):
            patches.append(patches[-1] - (13 if name == "r" else math.floor(patches[-1] - patches[-1] * 0.9)))
            merged = patches[-2] - patches[-1]
            count += 64 * ((patches[-2] + 1) ** 2 + merged**2)
        assert encoding.tokens.lengths.tolist() == [1 + patches[-1]] == [{"r": 41, "ratio": 60}[name]]
        assert float(cost.reducers) == count < 0.02 * float(cost.total)
    assert expected["r"] == pytest.approx(0.731, abs=0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of them"),
        ({"r": 3, "ratio": 0.9}, "expected one of them"),
        ({"r": -1}, "expected a whole number of tokens"),
        ({"ratio": 0.3}, "from 0.5 to 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PiToMe(8, **arguments)
