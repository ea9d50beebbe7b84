"""Token merging at the cost of another method, so that the two can be compared."""

from __future__ import annotations

import torch

from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import ToMe
from dtpvit.evaluation.cost import image_macs

__all__ = ["merge_to_cost"]


@torch.no_grad()
def merge_to_cost(trunk: VisionEncoder, macs: float, embed_dim: int = 0) -> int:
    """Let every :class:`ToMe` of an encoder merge as many tokens as brings an image nearest to a cost.

    Args:
        trunk: With ``ToMe`` in its blocks; their ``r`` is changed.
        macs: Multiply-accumulates of an image, matching included.
        embed_dim: Outputs behind the encoder, as in :func:`dtpvit.evaluation.cost.image_cost`.

    Returns:
        The ``r`` of every block.
    """
    merging = [reducer for reducer in trunk.reducers.values() if isinstance(reducer, ToMe)]
    image = trunk.pos_embed.new_zeros(1, trunk.patch_embed.proj.in_channels, *trunk.image_size)

    def cost(r: int) -> float:
        for reducer in merging:
            reducer.r = r
        return float(
            image_macs(trunk, VisionEncoder.forward(trunk, image), embed_dim)
        )  # of any image: counts are fixed

    fewest, most = 0, trunk.grid_size[0] * trunk.grid_size[1] // 2
    while fewest < most:  # the fewest merges that cost no more; more merges never cost more
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if cost(middle) <= macs else (middle + 1, most)
    nearest = min((r for r in (fewest - 1, fewest) if r >= 0), key=lambda r: abs(cost(r) - macs))
    cost(nearest)
    return nearest
