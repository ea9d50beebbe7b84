"""One compression for the reducers of a trunk, whatever they call their rates."""

from __future__ import annotations

import math

from torch import nn

from dtpvit.encoder import ImageEncoder
from dtpvit.encoder.reducers import DToMe, DynamicPooling, DynamicViT, GridPooling, PiToMe, ToDo, ToMe, ToMeSD
from dtpvit.encoder.reducers.boundary_pooling import BoundaryPooling
from dtpvit.encoder.reducers.selection import TokenSelection

__all__ = ["set_compression"]


def set_compression(trunk: ImageEncoder, compression: float) -> bool:
    """Let the reducers together leave about one token of ``compression`` patches, in proportion to their own rates.

    A threshold belongs to the rate that it was found for: at another one each image keeps its nominal number.

    Args:
        trunk: Its reducers' rates are changed.
        compression: Patches for each token, above 1.

    Returns:
        Whether any reducer has a rate that can be set without weights of another shape.
    """
    patches = trunk.grid_size[0] * trunk.grid_size[1]
    found = list(trunk.reducers.values())
    pooling = [r for r in found if isinstance(r, BoundaryPooling) and not isinstance(r, GridPooling)]
    for reducer, rate in zip(pooling, _shared([r.compression for r in pooling], compression), strict=True):
        if isinstance(reducer, DynamicPooling) and not reducer.fixed and not math.isclose(rate, reducer.compression):
            reducer.fix_budget()
        reducer.compression = rate
    selecting = [r for r in found if isinstance(r, TokenSelection)]
    total = [r for r in selecting if isinstance(r, DynamicViT)]  # whose rate is of the patches, not of what is left
    steps = [r for r in selecting if not isinstance(r, DynamicViT)]
    for reducer, rate in zip(steps, _shared([1 / r.keep for r in steps], compression), strict=True):
        reducer.keep = 1 / rate
    power = _power(1 / min((r.keep for r in total), default=1.0), compression)
    for reducer in total:
        reducer.keep = reducer.keep**power if power else compression ** -(1 / len(total))
    _share_merges([r for r in found if isinstance(r, ToMe | DToMe | PiToMe)], patches * (1 - 1 / compression))
    return any([_set_own(reducer, compression) for reducer in found]) or bool(pooling or selecting)


def _shared(rates: list[float], compression: float) -> list[float]:
    """Rates whose product is ``compression``, in the proportions of those given, on a logarithmic scale."""
    power = _power(math.prod(rates), compression)
    return [rate**power if power else compression ** (1 / len(rates)) for rate in rates]


def _power(whole: float, compression: float) -> float | None:
    return math.log(compression) / math.log(whole) if whole > 1 else None


def _share_merges(merging: list[ToMe | DToMe | PiToMe], merges: float) -> None:
    """Let so many tokens be merged in all, block by block in the proportions of now."""
    counted = [reducer for reducer in merging if reducer.r is not None]
    own = sum(reducer.r or 0 for reducer in counted)
    done = 0.0
    for reducer in counted:
        before, done = done, done + ((reducer.r or 0) / own if own else 1 / len(counted))
        reducer.r = round(merges * done) - round(merges * before)
        if isinstance(reducer, DToMe):
            reducer.max_r = None if reducer.max_r is None else max(reducer.max_r, reducer.r)
            reducer.calibration.threshold.fill_(math.nan)


def _set_own(reducer: nn.Module, compression: float) -> bool:
    """Set a rate that no other block shares in; whether there is one, of this reducer or together with others."""
    if isinstance(reducer, GridPooling):
        reducer.window = max(1, round(math.sqrt(compression)))
        reducer.compression = reducer.window**2
    elif isinstance(reducer, ToDo):
        reducer.factor = max(1, round(math.sqrt(compression)))
    elif isinstance(reducer, ToMeSD):
        reducer.ratio = 1 - 1 / compression
    elif isinstance(reducer, PiToMe) and reducer.ratio is not None:
        reducer.ratio = 1 / compression
    else:
        return isinstance(reducer, ToMe | DToMe | PiToMe)
    return True
