"""Means over segments: ours against the B x L x S einsum of the published implementation, time and memory.

python -m benchmarks.segment_mean --output docs/results/segment_mean.md
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.record import heading, pages, table
from dtpvit.encoder.layout import Layout
from dtpvit.encoder.ops.segments import Segments, pool_segments
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.measuring import Quartiles, alternate, memory_of_step, speed_ups

_WHAT = """\
Forward and backward of the mean over segments, gradient of the boundaries included (the averaging weights' own, in
both), {batch} images of width {dim}, on average one boundary in {compression} tokens. Memory is the peak beyond the
inputs.
"""


def segment_mean(
    lengths: list[int] = [196, 1024, 4096],  # noqa: B006 (never changed)
    batch: int = 4,
    dim: int = 768,
    compression: int = 4,
    rounds: int = 7,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Measure both at several lengths.

    Args:
        lengths: Tokens an image.
        batch: Images.
        dim: Width of a token.
        compression: Tokens for each boundary.
        rounds: Measured runs of each.
        device: auto, cpu, cuda.
        output: Markdown file to write.
    """
    place = chosen_device(device)
    rows = []
    for length in lengths:
        torch.manual_seed(0)
        features = torch.randn(batch, length, dim, device=place, requires_grad=True)
        starts = (torch.rand(batch, length, device=place) < 1 / compression).float()
        starts[:, 0] = 1
        starts.requires_grad_()
        rows.append(_row(features, starts, rounds))
    what = _WHAT.format(batch=batch, dim=dim, compression=compression)
    header = ["L", "einsum, ms", "ours, ms", "times faster", "einsum, MiB", "ours, MiB", "ours, KiB for each of L"]
    pages([heading("Mean over segments", place), what, table(header, rows)], output)


def _row(features: Tensor, starts: Tensor, rounds: int) -> list[object]:
    losses: dict[str, Callable[[], Tensor]] = {
        "einsum": lambda: einsum_mean(features, starts).square().sum(),
        "ours": lambda: packed_mean(features, starts).square().sum(),
    }
    for loss in losses.values():
        loss().backward()  # gradients exist from here on
    place, length = features.device, features.shape[1]
    memory = {name: memory_of_step(loss, place, backward=True).peak for name, loss in losses.items()}
    steps = {name: (lambda loss=loss: loss().backward()) for name, loss in losses.items()}
    seconds = alternate(steps, place, rounds=rounds)
    ratio = speed_ups(seconds, "einsum")["ours"]
    times = [f"{1000 * Quartiles.of(seconds[name]).median:.1f}" for name in losses]
    peaks = [f"{memory[name] / 2**20:.1f}" for name in losses]
    speed = f"**{ratio.median:.1f}** ({ratio.low:.1f}-{ratio.high:.1f})"
    return [length, *times, speed, *peaks, f"{memory['ours'] / length / 1024:.1f}"]


def einsum_mean(features: Tensor, starts: Tensor) -> Tensor:
    """The published form (Nawrot et al., ACL 2023): a (B, L, S) matrix of averaging weights.

    Args:
        features: Shape (B, L, D).
        starts: One where a segment begins, differentiable, shape (B, L).

    Returns:
        Every image's segments end to end, shape (sum of segments, D).
    """
    number = starts.cumsum(1) - 1
    count = number.detach().round().long().amax(1) + 1
    segment = torch.arange(int(count.max()), device=features.device)
    distance = number[..., None] - segment  # zero where a token is in the segment
    weight = torch.where(distance.detach().round() == 0, 1.0 + distance, 0.0)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    pooled = torch.einsum("bls,bld->bsd", weight, features)
    return pooled[segment < count[:, None]]


def packed_mean(features: Tensor, starts: Tensor) -> Tensor:
    """The same through :func:`dtpvit.encoder.ops.segments.pool_segments`; one synchronisation, like its like above."""
    batch, length, dim = features.shape
    layout = Layout.uniform_of(batch, length, 0, features.device)
    line = starts.reshape(-1)
    size = torch.ones(batch * length, device=features.device)
    segments = Segments.of(line, int(line.detach().sum()), size, layout.opening)
    return pool_segments(features.reshape(-1, dim), line, segments, estimator="dtp")


if __name__ == "__main__":
    auto_cli(segment_mean, as_positional=False)
