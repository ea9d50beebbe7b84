"""Attention, scan orders, noise, boundary decisions, minimum-variance segmentation, collectives."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.attention import class_attention, cross_attention, fold_key_bias, packed_attention
from dtpvit.encoder.ops.boundaries import band_loss, batch_threshold, binomial_loss, ratio_loss, top_per_image
from dtpvit.encoder.ops.min_variance import minimum_variance_starts
from dtpvit.encoder.ops.neighbourhood import neighbourhood_attention
from dtpvit.encoder.ops.noise import checksum, logistic_noise, uniform_noise
from dtpvit.encoder.ops.rows import take_rows
from dtpvit.encoder.ops.scan import ORDERS, scan_order


def layout_of(lengths, num_prefix=0):
    return Layout.fetched(torch.tensor(lengths), num_prefix)


def slow_attention(q, k, v, lengths, bias=None, causal=False):
    out, at = [], 0
    for n in lengths:
        part = slice(at, at + n)
        logits = torch.einsum("qhe,khe->hqk", q[part], k[part]) / q.shape[-1] ** 0.5
        if bias is not None:
            logits = logits + bias[part]
        if causal:
            logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        out.append(torch.einsum("hqk,khe->qhe", logits.softmax(-1), v[part]))
        at += n
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 7, 3], [4]])
@pytest.mark.parametrize(("with_bias", "causal"), [(False, False), (True, False), (False, True)])
def test_attention_and_gradients_equal_one_image_at_a_time(lengths, with_bias, causal):
    torch.manual_seed(0)
    fast = [torch.randn(sum(lengths), 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    slow = [x.detach().clone().requires_grad_() for x in fast]
    bias = torch.rand(sum(lengths), dtype=torch.float64) * 3 if with_bias else None
    found = packed_attention(torch.stack(fast, dim=1), layout_of(lengths), key_bias=bias, causal=causal)
    expected = slow_attention(*slow, lengths, bias, causal)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 7, 3], [4]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_class_attention_is_the_first_row_of_the_matrix(lengths, with_bias):
    torch.manual_seed(0)
    fast = torch.randn(sum(lengths), 3, 2, 4, requires_grad=True)
    slow = fast.detach().clone().requires_grad_()
    bias = torch.rand(sum(lengths)) * 3 if with_bias else None
    found = class_attention(fast, layout_of(lengths, num_prefix=1), bias)
    rows, q, k = [], slow[:, 0].split(lengths), slow[:, 1].split(lengths)
    for image, added in enumerate((torch.zeros(sum(lengths)) if bias is None else bias).split(lengths)):
        logits = torch.einsum("he,khe->hk", q[image][0], k[image]) / 2 + added
        rows.append(logits.softmax(-1).mean(0))
    expected = torch.cat(rows)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad)
    with pytest.raises(ValueError, match="needs a class token"):
        class_attention(fast, layout_of(lengths))


def test_duplicated_tokens_equal_one_of_size_two():
    torch.manual_seed(0)
    qkv = torch.randn(6, 3, 2, 4, dtype=torch.float64)
    twice = torch.tensor([0, 1, 1, 2, 3, 4, 5])
    size = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    merged = packed_attention(qkv, layout_of([6]), key_bias=size.log())
    apart = packed_attention(qkv[twice], layout_of([7]))
    torch.testing.assert_close(merged, apart[[0, 1, 3, 4, 5, 6]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_folded_bias_equals_added_bias(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 64, dtype=dtype)
    bias = torch.randint(1, 300, (9,)).double().log()
    folded = fold_key_bias(q, k, v, bias)
    assert folded[0].shape[-1] % 8 == 0
    logits = torch.einsum("qhe,khe->hqk", folded[0].double(), folded[1].double()) / 64**0.5
    expected = torch.einsum("qhe,khe->hqk", q.double(), k.double()) / 64**0.5 + bias
    # bfloat16 alone would be off by up to 0.02 at log 300
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-5)
    assert not folded[2][..., 64:].any()


@pytest.mark.parametrize("lengths", [[9, 9], [4, 9, 5]])
@pytest.mark.parametrize("how", ["packed", "cross", "neighbourhood"])
def test_sizes_keep_their_share_in_half_precision(lengths, how):
    """Alike keys are attended to as their sizes are to each other; rounded to bfloat16, log 273 would be 1.5% off."""
    torch.manual_seed(0)
    if how == "neighbourhood":
        lengths = [9, 9]
    size = torch.randint(100, 300, (sum(lengths),)).float()
    qkv = torch.zeros(sum(lengths), 3, 2, 20, dtype=torch.bfloat16)
    layout = layout_of(lengths)
    qkv[:, 2] = torch.eye(20)[layout.position][:, None].bfloat16()
    qkv[:, 0] = torch.randn(sum(lengths), 2, 20).bfloat16()  # keys are zero
    if how == "packed":
        found = packed_attention(qkv.requires_grad_(), layout, key_bias=size.log())
    elif how == "cross":
        found = cross_attention(qkv[:, 0], qkv[:, 1:], layout, layout, key_bias=size.log())
    else:
        found = neighbourhood_attention(qkv, (3, 3), (3, 3), key_bias=size.log())
    assert found.shape == (sum(lengths), 2, 20) and found.dtype == torch.bfloat16
    for own, seen in zip(size.split(lengths), found.detach().float().split(lengths), strict=True):
        expected = (own / own.sum()).expand(len(own), 2, -1)
        torch.testing.assert_close(seen[..., : len(own)], expected, rtol=0.008, atol=0)


def test_causal_with_bias_is_refused():
    x = torch.randn(2, 3, 1, 4)
    with pytest.raises(ValueError, match="causal"):
        packed_attention(x, layout_of([2]), key_bias=torch.zeros(2), causal=True)


def test_take_rows_has_the_gradient_of_indexing():
    index = torch.tensor([2, 0, 1])
    a = torch.randn(3, 2, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    weight = torch.randn(3, 2)
    (take_rows(a, index, index.argsort()) * weight).sum().backward()
    (b[index] * weight).sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 33), columns=st.integers(1, 33))
def test_scan_orders_visit_every_patch_once(order, rows, columns):
    line = scan_order(order, rows, columns)
    assert sorted(line.tolist()) == list(range(rows * columns))
    if order != "raster":  # each patch touches the one before it, at most at a corner
        row, column = line // columns, line % columns
        assert max([0, *row.diff().abs().tolist(), *column.diff().abs().tolist()]) <= 1


def test_hilbert_runs_are_compact():
    """A run of 16 patches of a 16 x 16 grid spans far less than a raster line's 16 columns."""
    line = scan_order("hilbert", 16, 16)
    for run in line.split(16):
        assert (run // 16).max() - (run // 16).min() < 8 and (run % 16).max() - (run % 16).min() < 8


def test_noise_is_a_function_of_seed_and_place():
    seed, place = torch.randint(1 << 62, (1, 500)), torch.arange(400)[:, None]
    u = uniform_noise(seed, place)
    assert torch.equal(u, uniform_noise(seed, place)) and u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    neighbours = torch.corrcoef(torch.stack((u[:-1].flatten(), u[1:].flatten())))[0, 1]
    images = torch.corrcoef(torch.stack((u[:, :-1].flatten(), u[:, 1:].flatten())))[0, 1]
    assert abs(neighbours) < 0.01 and abs(images) < 0.01
    g = logistic_noise(seed, place)
    assert g.isfinite().all() and abs(g.mean()) < 0.02 and abs(g.var() - torch.pi**2 / 3) < 0.1


def test_checksum_sees_every_pixel_and_no_neighbour():
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(checksum(images)[1:2], checksum(images[1:2]))
    changed = images.clone()
    changed[1, 2, 7, 7] += 1e-3
    assert (checksum(changed) != checksum(images)).tolist() == [False, True, False]


def test_batch_threshold_gives_exactly_the_count():
    scores = torch.randn(1000)
    for count in (0, 1, 250, 999, 1000):
        assert int((scores > batch_threshold(scores, count)).sum()) == count


def test_top_per_image_takes_the_best_of_each_image_beside_the_openings():
    layout = layout_of([4, 6, 2], num_prefix=1)
    scores = torch.tensor([9.0, 0, 1, 2, 9, 0, 3, 1, 5, 4, 0, 0])
    taken = top_per_image(scores, layout.opening, layout, torch.tensor([1, 2, 3]))
    assert taken.int().tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.floats(0.05, 0.95), st.data())
def test_binomial_loss_is_the_distribution_s(length, rate, data):
    count = data.draw(st.integers(0, length))
    found = binomial_loss(torch.tensor([float(count)]), torch.tensor([length]), rate)
    expected = -torch.distributions.Binomial(length, torch.tensor(rate)).log_prob(torch.tensor(float(count))) / length
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_rate_losses_are_least_at_their_target():
    rate = 0.25
    for f in (0.1, 0.25, 0.6):
        value = ratio_loss(torch.tensor(f), torch.tensor(f), rate)
        assert value >= 1 - 1e-6 and (abs(value - 1) < 1e-6) == (f == 0.25)
    assert band_loss(torch.tensor([0.2, 0.3]), 0.2, 0.3) == 0
    assert band_loss(torch.tensor([0.1, 0.5]), 0.2, 0.3) == pytest.approx(0.15)
    counts = torch.tensor([49.0000038], requires_grad=True)  # a straight-through sum is no exact integer
    binomial_loss(counts, torch.tensor([196]), 0.25).backward()
    assert counts.grad.isfinite().all()


def brute_force(features, weight, k):
    n = len(features)
    best, argbest = float("inf"), None
    for cuts in itertools.combinations(range(1, n), k - 1):
        borders, cost = [0, *cuts, n], 0.0
        for a, b in itertools.pairwise(borders):
            w = weight[a:b, None]
            mean = (w * features[a:b]).sum(0) / w.sum()
            cost += float((w * (features[a:b] - mean) ** 2).sum())
        if cost < best - 1e-12:
            best, argbest = cost, cuts
    return set(argbest) | {0}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.integers(0, 99), st.data())
def test_minimum_variance_is_the_best_of_all_segmentations(lengths, seed, data):
    g = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    features = torch.randn(len(lengths), longest, 3, generator=g, dtype=torch.float64)
    weight = torch.randint(1, 4, (len(lengths), longest), generator=g).double()
    for image, n in enumerate(lengths):
        weight[image, n:] = 0
    k = torch.tensor([data.draw(st.integers(1, n)) for n in lengths])
    starts = minimum_variance_starts(features, weight, k, int(k.max()))
    for image, n in enumerate(lengths):
        expected = brute_force(features[image, :n], weight[image, :n], int(k[image]))
        assert set(starts[image].nonzero().flatten().tolist()) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_groups_of_like_length_hold_every_token_once(lengths):
    layout = layout_of(lengths)
    groups = layout.groups
    assert torch.equal(groups.cells[groups.places], torch.arange(sum(lengths)))
    assert int((~groups.empty).sum()) == sum(lengths)
    assert sum(images for images, _, _ in groups.shapes) == len(lengths)
    start = 0
    for images, longest, full in groups.shapes:
        empty = groups.empty[start : start + images * longest].view(images, longest)
        start += images * longest
        assert full == (not empty.any())
        assert (~empty).sum(1).max() == longest and (~empty).sum(1).min() >= 0.6 * longest
    assert start == len(groups.cells)
