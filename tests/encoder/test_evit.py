"""EViT and Top-K against a slow reference with loops, written from the description of the methods."""

import math

import pytest
import torch

from dtpvit.encoder import Layout, Tokens, VisionEncoder
from dtpvit.encoder.reducers import Evidence, EViT, RandomBoundaries, ToMe, TopK
from dtpvit.evaluation.cost import image_cost
from dtpvit.interop.create import create_encoder


def small(reducers, **options):
    sizes = {"image_size": 48, "patch_size": 8, "dim": 24, "depth": 3, "num_heads": 2} | options
    encoder = VisionEncoder(**sizes, reducers=reducers)
    with torch.no_grad():  # attention that is not uniform
        for block in encoder.blocks:
            block.attn.qkv.weight.mul_(4)
    return encoder


def slow_selection(x, scores, size, members, keep, num_prefix, fuse):
    """Rows, sizes and patches of one image's tokens: prefix, those kept in descending order, the weighted sum."""
    places = range(num_prefix, len(x))
    count = math.ceil(keep * len(places))
    order = sorted(places, key=lambda place: -scores[place].item())  # stable
    kept, gone = order[:count], order[count:]
    rows = [x[place] for place in range(num_prefix)] + [x[place] for place in kept]
    sizes = [size[place] for place in range(num_prefix)] + [size[place] for place in kept]
    groups = [members[place] for place in range(num_prefix)] + [members[place] for place in kept]
    if fuse and gone:
        rows.append(sum(scores[place] * x[place] for place in gone))
        sizes.append(1.0)  # one token, whatever went into it
        groups.append([patch for place in gone for patch in members[place]])
    return torch.stack(rows), sizes, groups


def slow_encode(encoder, image, keeps, fuse):
    """One image through a ViT: class token after the norm, sizes and patches of each token."""
    x = encoder.embed(image[None]).features
    size, members = [1.0] * len(x), [[i] for i in range(len(x))]
    for index, block in enumerate(encoder.blocks):
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, -1).unbind(1)
        mixed, first = [], []
        for head in range(heads):
            attention = (q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5).softmax(-1)
            mixed.append(attention @ v[:, head])
            first.append(attention[0])
        x = x + block.attn.proj(torch.cat(mixed, dim=1))
        if index in keeps:
            x, size, members = slow_selection(x, sum(first) / heads, size, members, keeps[index], 1, fuse)
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)[0], size, members


@pytest.mark.parametrize("reducer", [EViT, TopK])
@pytest.mark.parametrize("keeps", [{0: 0.7, 1: 0.7, 2: 0.7}, {1: 0.01}, {0: 0.99, 2: 0.3}])
@pytest.mark.parametrize("training", [False, True])
def test_it_equals_the_slow_reference_gradients_included(reducer, keeps, training):
    encoder = small({block: reducer(24, keep=keep) for block, keep in keeps.items()}).double().train(training)
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    encoding = encoder(images)
    parameters = list(encoder.parameters())
    grads = torch.autograd.grad((encoding.pooled * torch.arange(24)).sum(), parameters)
    expected = [slow_encode(encoder, image, keeps, reducer is EViT) for image in images]
    pooled = torch.stack([features for features, _, _ in expected])
    torch.testing.assert_close(encoding.pooled, pooled, rtol=1e-6, atol=1e-6)
    for tokens, (_, size, members) in zip(encoding.tokens.split(), expected, strict=True):
        check_rows(tokens, size, members)
    slow = torch.autograd.grad((pooled * torch.arange(24)).sum(), parameters)
    for one, two in zip(grads, slow, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def check_rows(tokens, size, members):
    """Whether one image's tokens stand for these patches, places counted with the prefix, and no others for any."""
    expected = torch.full((tokens.patches.total,), -1)
    for row, group in enumerate(members[tokens.num_prefix :]):
        expected[torch.tensor(group) - tokens.num_prefix] = row
    assert tokens.size.tolist() == size and torch.equal(tokens.source, expected)


@pytest.mark.parametrize("num_prefix", [1, 2])
@pytest.mark.parametrize("lengths", [[9, 9], [3, 12, 7, 4], [3]])
@pytest.mark.parametrize("fuse", [False, True])
def test_any_lengths_sizes_and_keys_with_a_bias(fuse, num_prefix, lengths):
    total, keep = sum(lengths), 0.5
    layout = Layout.fetched(torch.tensor(lengths), num_prefix)
    patches = Layout.fetched(torch.tensor(lengths) - num_prefix)
    size = torch.where(layout.prefix, 1.0, torch.randint(1, 5, (total,)).float())
    source = torch.cat([torch.arange(length - num_prefix) for length in lengths])
    tokens = Tokens(torch.randn(total, 6), layout, size, source, patches, key_bias=size.log())
    scores = torch.randint(1, 5, (total,)).float() / 7  # with ties
    reducer = (EViT if fuse else TopK)(6, keep=keep)
    found = reducer(tokens, Evidence(class_attention=scores)).tokens
    assert found.layout.total == found.lengths.sum() and found.layout.longest == found.lengths.max()
    parts = zip(tokens.split(), scores.split(lengths), found.split(), strict=True)
    for before, own, after in parts:
        members = [[place] for place in range(len(own))]
        x, sizes, groups = slow_selection(before.features, own, before.size.tolist(), members, keep, num_prefix, fuse)
        torch.testing.assert_close(after.features, x)
        check_rows(after, sizes, groups)
        torch.testing.assert_close(after.key_bias, torch.tensor(sizes).log())
    if len(set(lengths)) > 1:
        unknown = Layout(layout.lengths, layout.longest, layout.total, num_prefix)  # the host knows no length
        again = reducer(
            Tokens(tokens.features, unknown, size, source, patches), Evidence(class_attention=scores)
        ).tokens
        assert torch.equal(again.features, found.features) and torch.equal(again.lengths, found.lengths)


def test_what_was_dropped_stays_dropped_and_is_spread_as_zeros():
    """After pooling, in ragged batches, twice; the size of what is left is that of the patches not lost."""
    reducers = {1: RandomBoundaries(24, compression=2), 2: TopK(24, keep=0.5), 3: TopK(24, keep=0.5)}
    encoder = small(reducers, depth=4).eval()
    encoding = encoder(torch.randn(5, 3, 48, 48))
    before, after = encoding.layouts[2].attention.lengths - 1, encoding.layouts[3].mlp.lengths - 1
    assert len(set(before.tolist())) > 1 and torch.equal(after, ((before / 2).ceil() / 2).ceil().long())
    for image in encoding.tokens.split():
        lost = image.source < 0
        assert lost.any() and image.size[1:].sum() == (~lost).sum() and torch.equal(image.kept_patches(), ~lost)
        assert not image.unpool()[lost].any() and image.unpool()[~lost].any(dim=1).all()
        assert torch.equal(torch.bincount(image.source[~lost]).float(), image.size[1:])
        assert torch.equal(image.key_bias, image.size.log())  # of the pooling before


def test_the_sum_is_one_token_to_whatever_weighs_tokens_later():
    """To a mean as read-out, and to the merges and the attention of a later reducer that goes by sizes."""
    images = torch.randn(3, 3, 48, 48)
    encoding = small({1: EViT(24, keep=0.5)}, readout="mean").eval()(images)
    for image, pooled in zip(encoding.tokens.split(), encoding.pooled, strict=True):
        torch.testing.assert_close(pooled, image.features[1:].mean(0))
        assert image.kept_patches().all()  # all are in some token
    encoding = small({0: EViT(24, keep=0.5), 1: ToMe(24, r=3)}).eval()(images)
    for image in encoding.tokens.split():
        count = (image.lengths - 1).item() + 3
        assert count == 19 and image.size[1:].sum() == count  # 18 kept, and the sum
        assert torch.equal(image.key_bias, image.size.log())


@pytest.mark.parametrize("score", ["norm", "random"])
def test_the_controls_keep_as_many_others(score):
    tokens = Tokens.from_dense(torch.randn(6, 31, 24), num_prefix=1, seed=torch.arange(6))
    reducer = TopK(24, keep=0.25, score=score).eval()
    out = reducer(tokens, Evidence()).tokens
    norms = tokens.features.view(6, 31, 24)[:, 1:].norm(dim=2)
    kept = (out.source >= 0).view(6, 30)
    assert out.lengths.tolist() == [9] * 6 and kept.sum(1).tolist() == [8] * 6
    highest = norms >= norms.sort(dim=1, descending=True).values[:, 7:8]
    assert torch.equal(kept, highest) == (score == "norm")
    if score == "random":
        assert len({tuple(row.tolist()) for row in kept}) == 6
        other = reducer(Tokens.from_dense(torch.randn(6, 31, 24), num_prefix=1, seed=torch.arange(6)), Evidence())
        assert torch.equal(other.tokens.source, out.source)  # the seed alone decides
        with pytest.raises(ValueError, match=r"tokens\.seed"):
            reducer(Tokens.from_dense(torch.randn(6, 31, 24), num_prefix=1), Evidence())


def test_keeping_everything_is_the_dense_encoder():
    images = torch.randn(2, 3, 48, 48)
    dense = small({}).eval()
    for reducer in (EViT, TopK):
        encoder = small({block: reducer(24, keep=1) for block in range(3)}).eval()
        encoder.load_state_dict(dense.state_dict())
        assert torch.equal(encoder(images).pooled, dense(images).pooled)


def deit(size, reducers, **options):
    return create_encoder(f"vit_{size}_patch16_224", reducers=reducers, **options).eval()


@pytest.mark.parametrize(
    ("name", "counts", "published"),
    [
        ("EViT", [140, 100, 72], {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}),
        ("TopK", [139, 98, 69], {0.7: 3.0, 0.5: 2.3}),
    ],
)
def test_counts_and_costs_are_the_published_ones(name, counts, published):
    """GMACs of DeiT-S with its classifier, reduced in blocks 3, 6 and 9, by keep rate; counts at 0.7."""
    for keep, gmacs in published.items():
        encoder = deit("small", {"3,6,9": {"class_path": name, "init_args": {"keep": keep}}})
        with torch.no_grad():
            encoding = encoder(torch.randn(1, 3, 224, 224))
        seen = [encoding.layouts[block].mlp.longest for block in (3, 6, 9)]
        assert keep != 0.7 or seen == counts
        cost = image_cost(encoder, encoding.layouts, 1000)
        assert float(cost.total) / 1e9 == pytest.approx(gmacs, abs=0.05)
        assert float(cost.reducers) == 384 * (197 + sum(seen[:2]))  # the class token's row


@pytest.mark.parametrize("keep", [0.0, 1.01, -1])
def test_a_share_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match="expected a share of the tokens"):
        EViT(8, keep=keep)


def test_a_score_that_is_none_is_refused():
    with pytest.raises(ValueError, match="score is 'gradient'; expected one of attention, norm, random"):
        TopK(8, keep=0.5, score="gradient")
