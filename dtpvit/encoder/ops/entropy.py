"""How much there is to see in a patch: the entropy of its pixels.

Shape letters: B images, N patches an image, T tokens of all images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtpvit.encoder.layout import Layout

__all__ = ["CELLS", "pixel_entropy", "spikes"]

CELLS = (1, 2, 4)  # sides, in patches, of the cells whose entropy is taken
_BINS = 512  # of grey levels, as Choudhury et al. (ICLR 2026) have them
_LEAST_RANGE = 1e-6


@torch.no_grad()
def pixel_entropy(images: Tensor, patch_size: int) -> Tensor:
    """Entropy in bits of the grey levels of each patch and of the cells of 2 x 2 and 4 x 4 patches that it lies in.

    Images arrive normalised by a mean and a standard deviation for each channel, which an encoder does not know. So
    each channel is spread over the range that it has in the image, before the channels are averaged to grey: whatever
    the normalisation was, the same picture has the same entropies. Photographs use nearly all of their range, so that
    this range is nearly that of the file.

    Args:
        images: Shape (B, C, H, W).
        patch_size: Side of a patch in pixels, which divides H and W.

    Returns:
        One column a side of :data:`CELLS`, infinite where the grid ends before the cell does; patches in raster order,
        image after image, float32, shape (B * N, 3).
    """
    pixels = images.detach().to(torch.float32)
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    grey = ((pixels - low) / (high - low).clamp(min=_LEAST_RANGE)).mean(1)
    # Rounded, not cut off: at full range the middle of a bin, never its edge, is where 8-bit pixels lie.
    level = (grey * (_BINS - 1)).round().to(torch.int64)
    rows, columns = level.shape[1] // patch_size, level.shape[2] // patch_size
    level = level.unflatten(2, (columns, patch_size)).unflatten(1, (rows, patch_size)).transpose(2, 3).flatten(3)
    ones = torch.ones((), device=level.device).expand(level.shape)
    counts = torch.zeros(*level.shape[:3], _BINS, device=level.device).scatter_add_(3, level, ones)
    return torch.stack([_entropy_of_cells(counts, side, patch_size) for side in CELLS], dim=3).flatten(0, 2)


def _entropy_of_cells(counts: Tensor, side: int, patch_size: int) -> Tensor:
    """Histograms of the patches, (B, rows, columns, bins), to the entropy of each one's cell, (B, rows, columns)."""
    rows, columns = counts.shape[1] // side, counts.shape[2] // side
    whole = counts[:, : rows * side, : columns * side]
    whole = whole.unflatten(2, (columns, side)).unflatten(1, (rows, side)).sum((2, 4))
    pixels = (side * patch_size) ** 2
    # -sum p log p with p = c / n; the logarithm of counts is much cheaper than xlogy
    nats = (math.log(pixels) - (whole * whole.clamp(min=1).log()).sum(3) / pixels).clamp(min=0)
    spread = (nats / math.log(2)).repeat_interleave(side, 1).repeat_interleave(side, 2)
    outside = (0, counts.shape[2] - columns * side, 0, counts.shape[1] - rows * side)
    return pad(spread, outside, value=float("inf"))


def spikes(entropy: Tensor, layout: Layout) -> Tensor:
    """Entropy at each place of the line less the higher one of the two places before.

    Places before an image's first patch do not count; there, and at the prefix, the rise is 0.

    Args:
        entropy: In line order, shape (T,).
        layout: Of the T places.

    >>> spikes(torch.tensor([5.0, 1.0, 3.0, 4.0, 2.0]), Layout.fetched(torch.tensor([5])))
    tensor([ 0., -4., -2.,  1., -2.])
    """
    one, two = (pad(entropy, (back, 0))[: layout.total] for back in (1, 2))
    second = layout.position == layout.num_prefix + 1
    return (entropy - torch.where(second, one, torch.maximum(one, two))).masked_fill(layout.opening, 0.0)
