"""The segment mean and its gradients against independent slow references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtpvit.encoder.ops.segments import Segments, group_sums, pool_segments, segment_ids


def einsum_mean(hidden, starts, size):
    """Mean pooling by the (L, S) matrix of dynamic token pooling, for one sequence, differentiable in all three."""
    count = starts.cumsum(0)
    columns = torch.arange(1, int(count.detach().round()[-1]) + 1, dtype=hidden.dtype)
    distance = columns[None] - count[:, None]  # zero in value where a token is in the segment
    member = torch.where(distance.detach().abs() < 0.5, 1 - distance, torch.zeros_like(distance))
    member = member * size[:, None]
    # Every weight is one in value; its gradient is that of the token's own count.
    return torch.einsum("ld,ls->sd", hidden, member) / member.sum(0)[:, None]


def pack(lengths, rate, seed, dim=5):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    opening = torch.zeros(total, dtype=torch.bool)
    opening[first] = True
    starts = (torch.rand(total, generator=g) < rate) | opening
    hidden = torch.randn(total, dim, dtype=torch.float64, generator=g)
    size = torch.randint(1, 5, (total,), generator=g).double()
    return hidden, starts.double(), size, opening


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 99))
def test_mean_and_dtp_gradients_equal_the_einsum_formula_in_float64(lengths, rate, seed):
    hidden, hard, size, opening = pack(lengths, rate, seed)
    fast_h, slow_h = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    fast_b, slow_b = hard.clone().requires_grad_(), hard.clone().requires_grad_()
    fast_s, slow_s = size.clone().requires_grad_(), size.clone().requires_grad_()
    segments = Segments.of(hard, int(hard.sum()), fast_s, opening)
    pooled = pool_segments(fast_h, fast_b, segments, estimator="dtp")
    parts = zip(slow_h.split(lengths), slow_b.split(lengths), slow_s.split(lengths), strict=True)
    expected = torch.cat([einsum_mean(*part) for part in parts])
    torch.testing.assert_close(pooled, expected, rtol=1e-13, atol=1e-13)
    weight = torch.randn(pooled.shape, dtype=torch.float64)
    (pooled * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(fast_h.grad, slow_h.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast_b.grad, slow_b.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast_s.grad, slow_s.grad, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 99))
def test_symmetric_vote_equals_its_definition(lengths, rate, seed):
    hidden, hard, size, opening = pack(lengths, rate, seed)
    segments = Segments.of(hard, int(hard.sum()), size, opening)
    starts = hard.clone().requires_grad_()
    pooled = pool_segments(hidden, starts, segments, estimator="symmetric")
    grad = torch.randn(pooled.shape, dtype=torch.float64)
    pooled.backward(grad)
    ids, votes = segment_ids(hard), torch.zeros(len(hard), dtype=torch.float64)
    for j in range(len(hard)):
        if opening[j]:
            continue
        s = int(ids[j])
        if hard[j]:
            n, m = size[ids == s - 1].sum(), size[ids == s].sum()
            middle = (n * pooled[s - 1] + m * pooled[s]) / (n + m)
            votes[j] = (grad[s - 1] @ (pooled[s - 1] - middle)).abs() + (grad[s] @ (pooled[s] - middle)).abs()
        else:
            tail = [i for i in range(j, len(hard)) if ids[i] == s]
            pull = sum(size[i] * (grad[s] @ (hidden[i] - pooled[s])) for i in tail)
            votes[j] = pull.abs() / size[ids == s].sum()
    torch.testing.assert_close(starts.grad, -votes.detach(), rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 99))
def test_gate_equals_multiplying_pooled_tokens_by_a_confidence_of_one(lengths, rate, seed):
    hidden, hard, size, opening = pack(lengths, rate, seed)
    segments = Segments.of(hard, int(hard.sum()), size, opening)
    starts, confidence = hard.clone().requires_grad_(), hard.clone().requires_grad_()
    pooled = pool_segments(hidden, starts, segments, estimator="gate")
    grad = torch.randn(pooled.shape, dtype=torch.float64)
    pooled.backward(grad)
    (pooled.detach() * confidence[hard > 0.5][:, None]).backward(grad)
    torch.testing.assert_close(starts.grad, confidence.grad.masked_fill(opening, 0.0))


def test_order_reads_the_tokens_in_another_sequence():
    hidden, hard, size, opening = pack([9], 0.4, 3)
    order = torch.tensor([0, 3, 1, 2, 8, 7, 6, 5, 4])
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ordered = pool_segments(a, hard, Segments.of(hard, int(hard.sum()), size, opening, order))
    line = pool_segments(b[order], hard, Segments.of(hard, int(hard.sum()), size[order], opening))
    torch.testing.assert_close(ordered, line)
    weight = torch.randn_like(ordered)
    (ordered * weight).sum().backward()
    (line * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_gradcheck_of_the_features():
    hidden, hard, size, opening = pack([6, 3], 0.5, 1)
    segments = Segments.of(hard, int(hard.sum()), size, opening)
    assert torch.autograd.gradcheck(lambda h: pool_segments(h, hard, segments), hidden.requires_grad_())


@pytest.mark.parametrize("length", [576, 1024, 5000])
def test_ids_are_exact_where_a_bfloat16_sum_is_not(length):
    starts = torch.ones(length, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(segment_ids(starts), torch.arange(length))


def test_constant_tokens_survive_in_bfloat16():
    hidden = torch.full((1024, 8), 0.75, dtype=torch.bfloat16)
    starts = (torch.arange(1024) % 100 == 0).float()
    segments = Segments.of(starts, 11, torch.ones(1024), torch.arange(1024) == 0)
    assert torch.equal(pool_segments(hidden, starts, segments), torch.full((11, 8), 0.75, dtype=torch.bfloat16))


def test_unknown_estimator_is_refused():
    hidden, hard, size, opening = pack([4], 0.5, 0)
    with pytest.raises(ValueError, match="expected one of dtp, symmetric, gate"):
        pool_segments(hidden, hard, Segments.of(hard, int(hard.sum()), size, opening), estimator="hope")


def test_the_order_in_which_a_device_adds_does_not_show():
    """Sizes of soft methods are fractions, whose sums in float32 depend on the order, unlike those of whole numbers."""
    values, group = torch.rand(20_000), torch.randint(7, (20_000,))
    expected = group_sums(values, group, 7)
    plain = []
    for seed in range(20):
        order = torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(group_sums(values[order], group[order], 7), expected)
        plain.append(torch.zeros(7).index_add_(0, group[order], values[order]))
    assert any(not torch.equal(one, plain[0]) for one in plain) and expected.dtype == torch.float32
    torch.testing.assert_close(expected, plain[0])
