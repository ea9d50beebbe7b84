"""Means over contiguous segments of a packed batch, and the gradient that teaches where segments start.

Shape letters: T tokens in, S segments out, D channels. "Line" is the order in which tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_ROWS_AT_ONCE = 1024  # on a CPU a product of so many rows stays in the cache

__all__ = [
    "ESTIMATORS",
    "Segments",
    "dtp_vote",
    "gate_vote",
    "group_sums",
    "pool_segments",
    "segment_ids",
    "spread_rows",
    "symmetric_vote",
]


def segment_ids(starts: Tensor) -> Tensor:
    """Number the segments 0..S-1, given one where a token opens a segment; exact at any length and precision.

    >>> segment_ids(torch.tensor([1.0, 0.0, 1.0]))
    tensor([0, 0, 1])
    """
    return (starts.detach() > 0.5).to(torch.int64).cumsum(0) - 1


def group_sums(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sum of the values of each of ``count`` groups, to which no gradient flows: (T,) and int64 (T,) to (S,).

    A CUDA device adds in any order; in float64 the order does not show in the result.
    """
    wide = values.detach().double()
    return wide.new_zeros(count).index_add_(0, group, wide).to(values.dtype)


@dataclass(frozen=True)
class Segments:
    """A partition of the line into contiguous segments.

    Attributes:
        ids: Segment of each place of the line, int64, shape (T,).
        begin: Place where each segment begins, int64, shape (S,).
        order: Token at each place of the line, int64, shape (T,), or None where the line is the packed order.
        opening: Places that must begin a segment whatever the logits say, bool, shape (T,).
        size: What the token at each place counts for, float32, shape (T,): its patches, perhaps times a learned weight,
            which then gets its exact gradient.
        total: Sum of the sizes of each segment, float32, shape (S,).
    """

    ids: Tensor
    begin: Tensor
    order: Tensor | None
    opening: Tensor
    size: Tensor
    total: Tensor

    @classmethod
    def of(cls, starts: Tensor, count: int, size: Tensor, opening: Tensor, order: Tensor | None = None) -> Segments:
        """Build from hard starts in line order.

        Args:
            starts: One where a segment begins, shape (T,).
            count: How many ones there are, known on the host.
            size: Patches of each token in packed order, perhaps weighted, shape (T,).
            opening: Shape (T,), in line order.
            order: Shape (T,).
        """
        ids = segment_ids(starts)
        places = torch.arange(ids.shape[0], device=ids.device)
        slot = torch.where(starts.detach() > 0.5, ids, count)  # all that begin nothing share the last, unused slot
        begin = places.new_empty(count + 1).scatter_(0, slot, places)[:count]
        line_size = size if order is None else size[order]
        return cls(ids, begin, order, opening, line_size, group_sums(line_size, ids, count))

    @classmethod
    def gathered(cls, destination: Tensor, count: int, size: Tensor) -> Segments:
        """Groups of tokens that lie anywhere: on the line that is sorted by group, they are segments.

        Args:
            destination: Group of each token, int64, shape (T,).
            count: How many groups there are, none of them empty.
            size: Patches of each token, shape (T,).
        """
        total = group_sums(size, destination, count)
        members = destination.new_zeros(count).index_add_(0, destination, torch.ones_like(destination))
        begin = members.cumsum(0) - members
        opening = torch.zeros_like(destination, dtype=torch.bool)
        if torch.compiler.is_exporting():  # a product with the table of groups by tokens needs no line
            return cls(destination, begin, None, opening, size, total)
        order = destination.argsort(stable=True)
        return cls(destination[order], begin, order, opening, size[order], total)

    def tokens(self) -> Tensor:
        """Segment of each token in packed order, int64, shape (T,)."""
        if self.order is None:
            return self.ids
        return torch.empty_like(self.ids).scatter_(0, self.order, self.ids)


Vote = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def _before(pull: Tensor, segments: Segments) -> Tensor:
    """Size-weighted sum of ``pull`` over the places of the same segment before each place, over the segment's size."""
    weighted = (pull * segments.size.to(pull.dtype)).to(torch.float64)
    exclusive = weighted.cumsum(0) - weighted
    within = exclusive - exclusive[segments.begin][segments.ids]
    return (within / segments.total.to(torch.float64)[segments.ids]).to(pull.dtype)


def dtp_vote(pull: Tensor, grad: Tensor, pooled: Tensor, segments: Segments) -> Tensor:
    """Gradient at each start through the averaging weights of dynamic token pooling.

    With w_l = 1 + (c_l - stop_gradient(c_l)), c the cumulative sum of the starts, and the weighted mean over each
    segment, dL/db_j = sum over l >= j in j's segment of <g_s, h_l - p_s> / n_s (Nawrot et al., "Efficient
    Transformers with Dynamic Token Pooling", ACL 2023, in closed form). It is exactly zero where a segment begins.

    Args:
        pull: <g_s, h_l - p_s> at each place l of segment s, shape (T,).
        grad: Gradient g at the pooled features, shape (S, D).
        pooled: Pooled features p, shape (S, D).
        segments: The partition.

    Returns:
        Shape (T,), in line order.
    """
    # The pulls of a segment sum to zero, so what follows is minus what came before.
    return -_before(pull, segments)


def symmetric_vote(pull: Tensor, grad: Tensor, pooled: Tensor, segments: Segments) -> Tensor:
    """How hard the loss pulls the two sides of each place apart, whichever way; shapes as in :func:`dtp_vote`.

    Splitting a mean-pooled segment under size-proportional attention changes the loss by nothing at first order, so
    the sign of :func:`dtp_vote` says little. Here every place votes for a boundary, by |<g_s, mean of what follows -
    p_s>| where there is none and by |<g_{s-1}, p_{s-1} - m>| + |<g_s, p_s - m>|, m the mean of the two segments,
    where there is one. Only relative size matters: how many boundaries there are is the rate control's business.
    """
    vote = _before(pull, segments).abs()
    share = segments.total.to(pooled.dtype)
    share = share[1:] / (share[:-1] + share[1:])  # of the right one in each pair of neighbours
    gap = pooled[1:] - pooled[:-1]
    apart = (grad[:-1] * gap).sum(1).abs() * share + (grad[1:] * gap).sum(1).abs() * (1 - share)
    vote = vote.index_copy(0, segments.begin[1:], apart.to(vote.dtype))
    return -vote.masked_fill(segments.opening, 0.0)


def gate_vote(pull: Tensor, grad: Tensor, pooled: Tensor, segments: Segments) -> Tensor:
    """<g_s, p_s> where segment s begins, zero elsewhere; shapes as in :func:`dtp_vote`.

    As if each pooled token were multiplied by the confidence in its boundary, rounded up to one in value: the
    straight-through gate of H-Net (Hwang, Wang and Gu, "Dynamic Chunking for End-to-End Hierarchical Sequence
    Modeling", 2025).
    """
    vote = pull.new_zeros(pull.shape).index_copy(0, segments.begin, (grad * pooled).sum(1).to(pull.dtype))
    return vote.masked_fill(segments.opening, 0.0)


ESTIMATORS: dict[str, Vote] = {"dtp": dtp_vote, "symmetric": symmetric_vote, "gate": gate_vote}


class _PoolSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, starts: Tensor, size: Tensor, segments: Segments, vote: Vote) -> Tensor:
        order = segments.order
        line = torch.arange(features.shape[0], device=features.device) if order is None else order
        # One fused pass that reads rows in line order and adds each segment in sequence: no (T, D) copy, no atomics.
        total = embedding_bag(
            line, features.detach(), segments.begin, mode="sum", per_sample_weights=size.detach().to(features.dtype)
        )
        pooled = total / segments.total[:, None].to(features.dtype)
        ctx.save_for_backward(features, pooled)
        ctx.segments, ctx.vote = segments, vote
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        features, pooled = ctx.saved_tensors
        segments: Segments = ctx.segments
        grad = grads[0]
        grad_features = grad_starts = grad_size = None
        # One tensor for both gradients: on a CPU a fresh (T, D) tensor costs more than filling it.
        spread = grad.index_select(0, segments.tokens())
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            wide = torch.promote_types(features.dtype, torch.float32)
            offset = _row_products(grad, pooled, wide)
            pull = _row_products(spread, features, wide)
            pull = pull if segments.order is None else pull[segments.order]
            pull = pull - offset[segments.ids]
            if ctx.needs_input_grad[1]:
                grad_starts = ctx.vote(pull, grad.to(wide), pooled.to(wide), segments)
            if ctx.needs_input_grad[2]:
                grad_size = pull / segments.total[segments.ids]
        if ctx.needs_input_grad[0]:
            share = segments.size.detach() / segments.total[segments.ids]
            if segments.order is not None:
                share = torch.empty_like(share).scatter_(0, segments.order, share)
            grad_features = spread.mul_(share[:, None].to(grad.dtype))
        return grad_features, grad_starts, grad_size, None, None


def _row_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Inner product of each row of ``a`` with the same row of ``b``, in ``dtype``: (T, D), (T, D) to (T,)."""
    rows = _ROWS_AT_ONCE if a.device.type == "cpu" else max(1, a.shape[0])
    parts = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([(x.to(dtype) * y.to(dtype)).sum(1) for x, y in parts])


def pool_segments(features: Tensor, starts: Tensor, segments: Segments, *, estimator: str = "symmetric") -> Tensor:
    """Size-weighted mean of the tokens of each segment.

    Args:
        features: Shape (T, D), packed order.
        starts: Straight-through starts in line order: zero or one in value, differentiable, shape (T,).
        segments: The partition that ``starts`` describes.
        estimator: What gradient ``starts`` gets: ``"symmetric"`` (:func:`symmetric_vote`), ``"dtp"``
            (:func:`dtp_vote`) or ``"gate"`` (:func:`gate_vote`).

    Returns:
        Shape (S, D). The gradients of ``features`` and ``segments.size`` are exact; O(T * D) in time and memory, no
        (T, S) matrix.

    Raises:
        ValueError: If ``estimator`` is unknown.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
    return _PoolSegments.apply(features, starts, segments.size, segments, ESTIMATORS[estimator])


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, destination: Tensor) -> Tensor:
        ctx.save_for_backward(destination)
        ctx.count = rows.shape[0]
        return rows.index_select(0, destination)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (destination,) = ctx.saved_tensors
        groups = Segments.gathered(destination, ctx.count, torch.ones_like(destination, dtype=torch.float32))
        assert groups.order is not None
        return embedding_bag(groups.order, grads[0], groups.begin, mode="sum"), None


def spread_rows(rows: Tensor, destination: Tensor) -> Tensor:
    """A copy of each token's group for the token; the gradient of a group is summed without atomics, hence repeatable.

    Args:
        rows: Of the groups, none of them empty, shape (S, D).
        destination: Group of each token, int64, shape (T,).

    Returns:
        Shape (T, D).
    """
    return _SpreadRows.apply(rows, destination)
