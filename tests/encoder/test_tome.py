"""ToMe against a slow reference with loops, written from the description of the method; and on real images."""

from dataclasses import replace

import pytest
import torch
from slow_merging import assert_equals_slow_reference, assert_merges_like, cosine, random_tokens, small
from torch import nn

from dtpvit.encoder import Layout, VisionEncoder
from dtpvit.encoder.reducers import Evidence, RandomBoundaries, ToMe
from dtpvit.evaluation.cost import image_cost, image_macs
from dtpvit.interop.create import create_encoder


def tome(rates, **options):
    return small({block: ToMe(24, r=rate) for block, rate in enumerate(rates)}, **options)


def slow_matching(r):
    """Pairs (a, b) that are merged; and the order prefix, even tokens, odd tokens, or as it was if nothing is asked."""

    def match(keys, num_prefix):
        places = range(len(keys))
        evens, odds = [i for i in places if i % 2 == 0], [i for i in places if i % 2 == 1]
        found = []
        for a in evens:
            best, partner = float("-inf"), None
            for b in odds:
                if a >= num_prefix and b >= num_prefix and cosine(keys[a], keys[b]) > best:
                    best, partner = cosine(keys[a], keys[b]), b
            if partner is not None:
                found.append((best, a, partner))
        found.sort(key=lambda edge: -edge[0])  # stable
        merges = min(r, (len(keys) - num_prefix) // 2)
        order = [i for i in places if i < num_prefix] + [i for i in evens + odds if i >= num_prefix]
        return [(a, b) for _, a, b in found[:merges]], order if r else places

    return match


@pytest.mark.parametrize("rates", [(5, 5, 5), (18, 0, 7), (40, 40, 40)], ids=["constant", "list", "saturated"])
@pytest.mark.parametrize("training", [False, True])
def test_it_equals_the_slow_reference_gradients_included(rates, training):
    encoder = tome(rates).double().train(training)
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    assert_equals_slow_reference(encoder, images, [slow_matching(rate) for rate in rates])


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [[9, 9], [3, 12, 7, 4], [3]])
def test_any_prefix_and_any_lengths(num_prefix, lengths):
    """Two prefix tokens are the class token and the distillation token, neither of which is merged."""
    tokens, keys = random_tokens(lengths, num_prefix)
    found = assert_merges_like(ToMe(6, r=3), slow_matching(3), tokens, keys)
    if len(set(lengths)) > 1:
        layout = tokens.layout
        unknown = Layout(layout.lengths, layout.longest, layout.total, num_prefix)  # the host knows no length
        again = ToMe(6, r=3)(replace(tokens, layout=unknown), Evidence(keys=keys)).tokens
        assert torch.equal(again.features, found.features) and torch.equal(again.lengths, found.lengths)


def test_after_another_reducer():
    """Ragged batches with sizes above one, whose attention is size-proportional before and after."""
    reducers = {1: RandomBoundaries(24, compression=2), 2: ToMe(24, r=6)}
    encoder = VisionEncoder(image_size=48, patch_size=8, dim=24, depth=4, num_heads=2, reducers=reducers).eval()
    encoding = encoder(torch.randn(5, 3, 48, 48))
    before, after = encoding.layouts[2].attention.lengths, encoding.layouts[2].mlp.lengths
    assert len(set(before.tolist())) > 1 and torch.equal(
        before - after, torch.minimum((before - 1) // 2, before * 0 + 6)
    )
    assert all(image.size[1:].sum() == 36 for image in encoding.tokens.split())
    assert torch.equal(encoding.tokens.key_bias, encoding.tokens.size.log())


def test_nothing_to_merge_is_the_dense_encoder():
    encoder, dense = tome((0, 0, 0)).eval(), small({}).eval()
    dense.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(encoder(images).pooled, dense(images).pooled)
    assert float(image_cost(encoder, encoder(images).layouts).reducers.sum()) == 0


def test_merging_equal_tokens_changes_nothing():
    """An image of one colour without positions: all patch tokens are equal, and stay so."""
    encoder, dense = tome((9, 9, 9), readout="mean").eval(), small({}, readout="mean").eval()
    with torch.no_grad():
        encoder.pos_embed.zero_()
    dense.load_state_dict(encoder.state_dict())
    image = torch.full((1, 3, 48, 48), 0.3)
    with torch.no_grad():
        found, expected = encoder(image), dense(image)
        assert found.tokens.lengths.tolist() == [10]
        torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-5, atol=1e-5)
        for reducer in encoder.reducers.values():
            reducer.proportional = False
        assert (encoder(image).pooled - expected.pooled).abs().max() > 1e-3


def deit(size, r, **options):
    reducers = {"0-11": {"class_path": "ToMe", **r}}
    return create_encoder(f"vit_{size}_patch16_224", reducers=reducers, **options).eval()


def test_counts_and_costs_are_the_published_ones():
    """197 - 12 * 13 = 41 tokens; GMACs, matching left out, of DeiT-S with its classifier and of DeiT-Ti without."""
    image = torch.randn(1, 3, 224, 224)
    small, tiny = {8: 3.4, 13: 2.7, 16: 2.3}, {8: 0.924, 12: 0.769, 13: 0.731, 16: 0.621}
    for size, classes, digits, published in (("small", 1000, 0.05, small), ("tiny", 0, 0.001, tiny)):
        for r, gmacs in published.items():
            encoder = deit(size, {"init_args": {"r": r}})
            with torch.no_grad():
                encoding = encoder(image)
            assert encoding.tokens.lengths.tolist() == [11 if r == 16 else 197 - 12 * r]  # 21 before the last block
            cost = image_cost(encoder, encoding.layouts, classes)
            assert float(cost.total - cost.reducers) / 1e9 == pytest.approx(gmacs, abs=digits)
            assert 0 < float(cost.reducers) < 0.01 * float(cost.total)


def test_the_decreasing_schedule():
    encoder = deit("tiny", {"each": {"r": {"from": 26, "to": 0}}}, image_size=112)
    assert [reducer.r for reducer in encoder.reducers.values()] == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]


@pytest.mark.parametrize("r", [-1, 2.5, "8"])
def test_a_count_that_is_none_is_refused(r):
    with pytest.raises(ValueError, match="expected a whole number of tokens"):
        ToMe(8, r=r)


@pytest.mark.slow
def test_accuracy_on_real_images_is_that_of_the_authors_code(shared_data):
    """DeiT-Tiny as it is, r = 12, 1,000 images of ImageNet: 76.4 % with the authors' code."""
    from dtpvit.datamodules.labelled import LabelledLoader
    from dtpvit.datamodules.labelled_index import index_labelled

    path = shared_data / "weights" / "deit_tiny_patch16_224.pth"
    state = torch.load(path, weights_only=True)["model"]
    head = nn.Linear(192, 1000)
    head.load_state_dict({"weight": state["head.weight"], "bias": state["head.bias"]})
    encoder = deit("tiny", {"init_args": {"r": 12}}, init=path)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    right = images = 0
    index = index_labelled(str(shared_data / "imagenet_sample"))
    for batch in LabelledLoader(index, image_size=(224, 224), crop_pct=0.9, batch_size=50, num_workers=0):
        pixels = (batch["image"].float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        with torch.no_grad():
            encoding = encoder(pixels)
            right += int((head(encoding.pooled).argmax(1) == batch["label"]).sum())
        images += len(pixels)
    assert images == 1000 and float(image_macs(encoder, encoding).mean()) / 1e9 == pytest.approx(0.772, abs=0.001)
    assert 100 * right / images == pytest.approx(76.4, abs=0.1)
