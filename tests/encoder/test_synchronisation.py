"""The host waits for the device once a reducer and once in the text tower, never more: guarded by counting."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dtpvit.encoder import DualEncoder, VisionEncoder, VisualTower
from dtpvit.encoder.reducers import (
    DToMe,
    DynamicPooling,
    DynamicViT,
    EViT,
    FixedStride,
    GridPooling,
    PiToMe,
    Quadtree,
    RandomBoundaries,
    SpatialGrouping,
    ToDo,
    TokenLearner,
    ToMe,
    ToMeSD,
    TopK,
    WindowedToMe,
)

_READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"}
_WAITS = ("_local_scalar_dense", "nonzero.default", "masked_select", "unique", "is_nonzero", "equal.default")


class Reads(TorchFunctionMode):
    """Counts what reads a tensor's values on the host, in Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in _READS:
            self.found.append(function.__name__)
        return function(*args, **kwargs or {})


class Waits(TorchDispatchMode):
    """Counts operations whose result's shape or value depends on data; a CUDA device would be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = "aten.index" in name and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        unknown = "repeat_interleave" in name and (kwargs or {}).get("output_size") is None
        if any(part in name for part in _WAITS) or by_mask or unknown:
            self.found.append(name)
        return function(*args, **kwargs or {})


def waits_in(function):
    with Reads() as reads, Waits() as waits:
        function()
    # One tolist reaches the dispatcher as one read for each number: those are no waits of their own.
    return reads.found + [name for name in waits.found if "_local_scalar_dense" not in name]


def encoder(reducers):
    return VisionEncoder(image_size=64, patch_size=8, dim=32, depth=4, num_heads=2, reducers=reducers)


def learner(**options):
    return TokenLearner(32, num_tokens=4, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("reducers", "expected"),
    [
        ({}, 0),
        ({1: DynamicPooling(32, compression=4)}, 1),
        ({1: DynamicPooling(32, compression=4, router="cosine", order="hilbert")}, 1),
        ({1: DynamicPooling(32, compression=2), 2: DynamicPooling(32, compression=2)}, 2),
        ({1: DynamicPooling(32, compression=4, budget="fixed")}, 0),
        ({1: FixedStride(32, compression=4)}, 0),
        ({1: GridPooling(32, window=2)}, 0),
        ({1: RandomBoundaries(32, compression=4)}, 1),
        ({0: ToMe(32, r=9), 1: ToMe(32, r=9)}, 0),
        ({1: WindowedToMe(32), 2: WindowedToMe(32, matching="parts")}, 0),
        ({1: SpatialGrouping(32), 2: SpatialGrouping(32, scope="dense")}, 0),
        ({1: DynamicPooling(32, compression=2), 2: ToMe(32, r=3), 3: ToMe(32, r=3)}, 1),
        ({0: ToMeSD(32, random=True), 1: ToDo(32), 2: ToDo(32, method="max_pool"), 3: learner(fuse=True)}, 0),
        ({0: learner(version="1.0", fuse=True), 1: DynamicPooling(32, compression=2), 2: learner()}, 1),
        ({0: PiToMe(32, r=9), 1: PiToMe(32, ratio=0.8, protect=False)}, 0),
        ({0: DToMe(32, r=9), 1: DToMe(32, r=9)}, 2),
        ({0: DToMe(32, r=9), 1: PiToMe(32, ratio=0.8)}, 1),
        ({0: EViT(32, keep=0.5), 1: TopK(32, keep=0.5), 2: TopK(32, keep=0.5, score="random")}, 0),
        ({1: DynamicPooling(32, compression=2), 2: EViT(32, keep=0.5), 3: TopK(32, keep=0.5)}, 1),
        ({0: DynamicViT(32, keep=0.5), 1: DynamicViT(32, keep=0.3)}, 0),
        ({1: DynamicPooling(32, compression=2), 2: DynamicViT(32, keep=0.3)}, 1),
        ({0: Quadtree(32)}, 1),
        ({1: DynamicPooling(32, compression=4, router="entropy")}, 1),
        ({1: DynamicPooling(32, compression=4, router="entropy", budget="fixed")}, 0),
        ({1: DynamicPooling(32, compression=4, router="cosine", estimator="gate", rate="ratio", noise=False)}, 1),
    ],
    ids=[
        *["dense", "dynamic", "cosine", "twice", "fixed budget", "stride", "grid", "random", "tome"],
        *["windowed tome", "grouping", "tome, ragged"],
        *["restored", "token learner, ragged", "pitome", "dtome", "pitome, ragged"],
        *["selection", "selection, ragged", "masks", "masks, ragged"],
        *["quadtree", "entropy", "entropy, fixed budget", "hnet"],
    ],
)
def test_one_wait_a_reducer(reducers, expected, training):
    model = encoder(reducers).train(training)
    images, seeds = torch.randn(6, 3, 64, 64), torch.arange(6)
    found = waits_in(lambda: model(images, seeds=seeds).pooled.sum().backward())
    assert len(found) == expected, found


def test_one_wait_in_the_text_tower():
    tower = VisualTower(encoder({}), 16)
    model = DualEncoder(tower, 16, text={"context_length": 12, "vocab_size": 30, "width": 32, "heads": 2, "layers": 2})
    text = torch.zeros(3, 12, dtype=torch.int64)
    text[:, 1:4] = torch.tensor([[5, 29, 0], [3, 4, 29], [29, 0, 0]])
    found = waits_in(lambda: model.encode_text(text).sum().backward())
    assert found == ["tolist"]


def test_the_counting_sees_a_wait():
    """Else every test above would pass whatever the encoder did."""
    x = torch.randn(4)
    for wait in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x[x > 0], lambda: x.nonzero()):
        assert len(waits_in(wait)) >= 1
    assert waits_in(lambda: x.sum().backward() if x.requires_grad else x + 1) == []
