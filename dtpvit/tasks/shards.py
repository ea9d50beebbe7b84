"""Tensors that are cut between the ranks, and those that are whole on each: one from the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["cut_again", "cut_like", "joined", "local", "whole"]


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut between the ranks; any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Any) -> Any:
    """A tensor's values on all ranks together, on the first rank's host; the others, which help, keep their share.

    The first rank alone writes checkpoints; anything that is not cut stays as it is.
    """
    if not isinstance(value, DTensor):
        return value
    gathered = value.full_tensor()
    return gathered.cpu() if distributed.get_rank() == 0 else value


def cut_like(mine: Any, value: Any) -> Any:
    """This rank's share of a whole tensor, where that which it is for is cut and has its shape."""
    if isinstance(mine, DTensor) and isinstance(value, Tensor) and value.shape == mine.shape:
        return distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements, src_data_rank=None)
    return value


def joined(mine: Tensor, part: Tensor) -> Tensor:
    """A tensor cut as ``mine`` is, of which this rank has ``part``; the part itself where ``mine`` is whole."""
    if not isinstance(mine, DTensor):
        return part
    return DTensor.from_local(
        part.to(mine.device),
        mine.device_mesh,
        mine.placements,
        run_check=False,
        shape=mine.shape,
        stride=mine.stride(),
    )


def cut_again(module: nn.Module) -> None:
    """Let go of what was gathered of the others' shares, so that parameters are this rank's again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
