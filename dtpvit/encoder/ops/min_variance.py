"""Exact minimum-variance segmentation of a line of tokens by dynamic programming.

Shape letters: B images, N places, D channels, K segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["minimum_variance_starts", "segment_costs"]

_CHUNK_BYTES = 1 << 28


def segment_costs(features: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared distance of the tokens of every segment [a, b) to the segment's mean.

    One Gram matrix of prefix sums gives all of them: sum w|h|^2 - |sum w h|^2 / sum w. Float64 throughout: the
    differences of prefix sums cancel, and a segmentation must not hang on the rounding of a batched product.

    Args:
        features: Shape (B, N, D).
        weight: Patches of each token, 0 for padding, shape (B, N).

    Returns:
        Shape (B, N + 1, N + 1), indexed [image, a, b]; infinite where a >= b.
    """
    h = features.to(torch.float64)
    w = weight.to(torch.float64)[..., None]
    h = h - (w * h).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp(min=1.0)  # a shift changes no variance
    sums = torch.nn.functional.pad((w * h).cumsum(1), (0, 0, 1, 0))
    squares = torch.nn.functional.pad((w * h * h).sum(2).cumsum(1), (1, 0))
    mass = torch.nn.functional.pad(w[..., 0].cumsum(1), (1, 0))
    gram = sums @ sums.transpose(1, 2)
    norm = gram.diagonal(dim1=1, dim2=2)
    distance = norm[:, :, None] + norm[:, None, :] - 2 * gram
    patches = (mass[:, None, :] - mass[:, :, None]).clamp(min=1e-12)
    cost = (squares[:, None, :] - squares[:, :, None] - distance / patches).clamp(min=0.0)
    places = torch.arange(cost.shape[1], device=cost.device)
    return cost.masked_fill(places[:, None] >= places, float("inf"))


def minimum_variance_starts(features: Tensor, weight: Tensor, segments: Tensor, most: int) -> Tensor:
    """Starts of the K contiguous segments with the least total squared distance to their means.

    O(N^2 D + K N^2) an image, K - 1 sequential steps, batched over images.

    Args:
        features: Shape (B, N, D).
        weight: Patches of each token, 0 for padding behind an image's tokens, shape (B, N).
        segments: K of each image, between 1 and its tokens, int64, shape (B,).
        most: ``segments.max()``, known on the host.

    Returns:
        True where a segment starts, bool, shape (B, N).
    """
    batch, length, _ = features.shape
    if torch.compiler.is_exporting():  # chunks would fix the number of images
        return _starts(features, weight, segments, most)
    step = max(1, _CHUNK_BYTES // (8 * (length + 1) ** 2))
    parts = [
        _starts(features[i : i + step], weight[i : i + step], segments[i : i + step], most)
        for i in range(0, batch, step)
    ]
    return torch.cat(parts)


def _starts(features: Tensor, weight: Tensor, segments: Tensor, most: int) -> Tensor:
    cost = segment_costs(features, weight)
    best, back = cost[:, 0], []
    for _ in range(most - 1):
        best, origin = (best[:, :, None] + cost).min(dim=1)
        back.append(origin)
    end = (weight > 0).sum(1)
    starts = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    starts[:, 0] = True
    for k in range(most, 1, -1):  # the k-th segment begins where the last step towards k segments came from
        active = segments >= k
        end = torch.where(active, back[k - 2].gather(1, end[:, None])[:, 0], end)
        # An image that has fewer segments marks its first place again, which changes nothing.
        starts.scatter_(1, torch.where(active, end, 0)[:, None], True)
    return starts
