"""Random numbers that are a function of a seed and a position, on every device alike.

A generator's stream depends on the order of its calls and on who else is in the batch; a hash of (seed of the image,
position in the image) does not. So an image draws the same noise alone, in any batch, on any rank, and again when a
step is replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["advance_seed", "checksum", "draw_seeds", "logistic_noise", "uniform_noise"]

# SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); torch has no uint64 arithmetic, int64 wraps the same way.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform_noise(seed: Tensor, position: Tensor) -> Tensor:
    """Uniform on the open interval (0, 1), 23 bits, float32.

    Args:
        seed: int64, any shape.
        position: int64, broadcastable to ``seed``.

    >>> uniform_noise(torch.tensor([7, 7, 8]), torch.tensor([0, 1, 0]))
    tensor([0.4163, 0.4499, 0.9154])
    """
    bits = _mix(_mix(seed * _GAMMA) + (position + 1) * _GAMMA)
    return (_shift(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


def logistic_noise(seed: Tensor, position: Tensor) -> Tensor:
    """log u - log(1 - u), the noise of the Gumbel-sigmoid, float32, shapes as in :func:`uniform_noise`."""
    u = uniform_noise(seed, position)
    return u.log() - torch.log1p(-u)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Fresh seeds from torch's own generator, which a resumed or replayed step puts back, int64, shape (count,)."""
    return torch.randint(1 << 62, (count,), dtype=torch.int64).to(device)


def advance_seed(seed: Tensor) -> Tensor:
    """A fresh seed for the next reducer that looks at the same image."""
    return _mix(seed + _GAMMA)


def checksum(images: Tensor) -> Tensor:
    """A seed that follows from an image's own pixels, exact and independent of its batch, int64, shape (B,).

    Args:
        images: Shape (B, C, H, W), floating point.
    """
    bits = images.detach().to(torch.float32).contiguous().view(torch.int32).flatten(1).to(torch.int64)
    weight = torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)
    return _mix((bits * weight).sum(1))
