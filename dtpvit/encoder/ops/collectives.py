"""Statistics over all ranks; the identity where training runs in one process."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["add_up", "gather_columns", "gather_objects"]

T = TypeVar("T")


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def add_up(*counts: int, device: torch.device) -> list[int]:
    """Sum of each whole number over the ranks; costs nothing where there is one."""
    if _alone():
        return list(counts)
    total = torch.tensor(counts, device=device)
    distributed.all_reduce(total)
    return total.tolist()


def gather_objects(mine: T) -> list[T]:
    """Every rank's, in rank order; for what is small and rare."""
    if _alone():
        return [mine]
    found = [mine] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found


def gather_columns(values: Tensor) -> Tensor:
    """Concatenate every rank's columns, in rank order; each rank may have another number of them.

    Args:
        values: Shape (R, n), detached.

    Returns:
        Shape (R, sum of n), the same on all ranks.
    """
    if _alone():
        return values
    world = distributed.get_world_size()
    mine = torch.tensor([values.shape[1]], device=values.device)
    counts = [torch.zeros_like(mine) for _ in range(world)]
    distributed.all_gather(counts, mine)
    sizes = torch.cat(counts).tolist()
    padded = torch.nn.functional.pad(values, (0, max(sizes) - values.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)
