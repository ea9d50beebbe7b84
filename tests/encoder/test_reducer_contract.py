"""The contract of DESIGN: one test over all reducers. A new reducer is one new line in REDUCERS."""

import copy
from functools import cache

import pytest
import torch

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.layers import Block
from dtpvit.encoder.ops.entropy import pixel_entropy
from dtpvit.encoder.reducers import (
    DToMe,
    DynamicPooling,
    DynamicViT,
    Evidence,
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
from dtpvit.encoder.reducers.boundary_pooling import BoundaryPooling

D, GRID, PREFIX = 96, (6, 5), 1


def quadtree(compression):
    """As if trained: its MLP adds something to the means."""
    reducer = Quadtree(D, thresholds=(0, 0) if compression == 1 else (8, 7.5))
    torch.nn.init.normal_(reducer.mlp.fc2.weight, std=0.1)
    return reducer


def dynamic(**options):
    return lambda compression: DynamicPooling(D, compression=compression, **options)


def weighted(router, **options):
    """As if fitted: tokens count for more or less in their segment's mean."""

    def make(compression):
        reducer = DynamicPooling(D, compression=compression, router=router, **options)
        reducer.boundary_predictor.boundary_sensitivity.data.normal_(std=0.1)
        return reducer

    return make


def learner(**options):
    return lambda compression: TokenLearner(D, num_tokens=8 if compression == 4 else 30, **options)


def fused(compression):
    """As if trained: what was learned is mixed in."""
    reducer = learner(fuse=True)(compression)
    reducer.fuser.among.weight.data.normal_(std=0.5)
    return reducer


def windowed(**options):
    return lambda compression: WindowedToMe(D, window=1 if compression == 1 else 4, **options)


def grouping(**options):
    return lambda compression: SpatialGrouping(D, stride=1 if compression == 1 else 2, **options)


REDUCERS = [
    pytest.param(dynamic(), id="dynamic"),
    pytest.param(dynamic(estimator="dtp", order="raster"), id="dynamic-dtp"),
    pytest.param(dynamic(router="cosine", order="serpentine"), id="dynamic-cosine"),
    pytest.param(dynamic(router="minimum_variance"), id="minimum-variance"),
    pytest.param(weighted("sensitivity"), id="sensitivity"),
    pytest.param(weighted("local"), id="dynamic-local"),
    pytest.param(weighted("local", estimator="imitation"), id="imitation"),
    pytest.param(weighted("local", estimator="imitation", budget="fixed"), id="imitation-fixed"),
    pytest.param(dynamic(budget="fixed"), id="dynamic-fixed"),
    pytest.param(dynamic(estimator="symmetric"), id="dynamic-symmetric"),
    pytest.param(dynamic(router="cosine", estimator="gate"), id="dynamic-gate"),
    pytest.param(dynamic(rate="binomial", estimator="symmetric"), id="dynamic-binomial"),
    pytest.param(dynamic(rate="ratio", estimator="dtp"), id="dynamic-ratio"),
    pytest.param(dynamic(rate="band", estimator="symmetric"), id="dynamic-band"),
    pytest.param(dynamic(router="cosine", estimator="gate", rate="ratio", noise=False, temperature=1.0), id="hnet"),
    pytest.param(dynamic(noise=False), id="dynamic-noiseless"),
    pytest.param(dynamic(router="entropy"), id="entropy"),
    pytest.param(dynamic(router="entropy", budget="fixed", order="raster"), id="entropy-fixed"),
    pytest.param(dynamic(estimator="imitation", teacher="entropy"), id="imitation-entropy"),
    pytest.param(dynamic(proportional=False), id="dynamic-unproportional"),
    pytest.param(dynamic(null_token=True), id="dynamic-null"),
    pytest.param(lambda c: FixedStride(D, compression=c, order="hilbert"), id="stride"),
    pytest.param(lambda c: RandomBoundaries(D, compression=c), id="random"),
    pytest.param(lambda c: RandomBoundaries(D, compression=c, budget="fixed"), id="random-fixed"),
    pytest.param(lambda c: GridPooling(D, window=1 if c == 1 else 2), id="grid"),
    pytest.param(quadtree, id="quadtree"),
    pytest.param(lambda c: ToMe(D, r=0 if c == 1 else 15), id="tome"),
    pytest.param(lambda c: ToMeSD(D, ratio=0 if c == 1 else 0.5), id="tomesd"),
    pytest.param(lambda c: ToMeSD(D, ratio=0 if c == 1 else 0.5, random=True), id="tomesd-random"),
    pytest.param(lambda c: ToDo(D, factor=1 if c == 1 else 2), id="todo"),
    pytest.param(lambda c: ToDo(D, factor=1 if c == 1 else 2, method="max_pool"), id="todo-max"),
    pytest.param(lambda c: ToDo(D, factor=1 if c == 1 else 2, method="avg_pool"), id="todo-avg"),
    pytest.param(learner(), id="token-learner"),
    pytest.param(learner(version="1.0"), id="token-learner-1.0"),
    pytest.param(fused, id="token-fuser"),
    pytest.param(lambda c: PiToMe(D, r=0 if c == 1 else 9), id="pitome"),
    pytest.param(lambda c: DToMe(D, r=0 if c == 1 else 9), id="dtome"),
    pytest.param(lambda c: PiToMe(D, ratio=1 if c == 1 else 0.7, protect=False), id="pitome-unprotected"),
    pytest.param(lambda c: DynamicViT(D, keep=1 / c), id="dynamic-vit"),
    pytest.param(lambda c: EViT(D, keep=1 / c), id="evit"),
    pytest.param(lambda c: TopK(D, keep=1 / c), id="top-k"),
    pytest.param(lambda c: TopK(D, keep=1 / c, score="norm"), id="top-k-norm"),
    pytest.param(lambda c: TopK(D, keep=1 / c, score="random"), id="top-k-random"),
    pytest.param(windowed(), id="windowed-tome"),
    pytest.param(windowed(matching="two_rounds"), id="windowed-tome-two-rounds"),
    pytest.param(windowed(matching="parts"), id="windowed-tome-parts"),
    pytest.param(windowed(by_size=False, proportional=False), id="windowed-tome-published"),
    pytest.param(grouping(), id="grouping"),
    pytest.param(grouping(scope="dense"), id="grouping-dense"),
]
NOMINAL = {
    GridPooling: 9 / 30,
    ToMe: 15 / 30,
    ToMeSD: 15 / 30,
    ToDo: 6 / 30,
    PiToMe: 21 / 30,
    DToMe: 21 / 30,
    EViT: 9 / 30,
    WindowedToMe: 9 / 30,
    SpatialGrouping: 9 / 30,
}  # rate asked for here, of those that cannot have 1 / 4 at once


def weights_of(reducer, tokens):
    """What each patch of one image counts for in its segment's mean: 1, unless the reducer's router says otherwise."""
    router = getattr(reducer, "boundary_predictor", None)
    weights = None if router is None else router.weights(tokens)
    return torch.ones(tokens.patches.total) if weights is None else weights[PREFIX:]


@pytest.fixture(params=REDUCERS)
def make(request):
    return request.param


def dense_tokens(batch=5, dtype=torch.float32):
    features = torch.randn(batch, PREFIX + GRID[0] * GRID[1], D, dtype=dtype)
    contrast = torch.nn.functional.interpolate(torch.rand(batch, 3, *GRID), scale_factor=16).pow(3)
    entropy = pixel_entropy(contrast * torch.rand(batch, 3, 16 * GRID[0], 16 * GRID[1]), 16)
    seed = torch.randint(1 << 62, (batch,))
    return Tokens.from_dense(features, num_prefix=PREFIX, grid=GRID, seed=seed, pixel_entropy=entropy)


def ragged_tokens(batch=5):
    """Tokens after an earlier reduction: unequal lengths, sizes above one."""
    return RandomBoundaries(D, compression=2).eval()(dense_tokens(batch), Evidence()).tokens


@cache
def block():
    """What reducers that act inside a block are placed in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Block(D, num_heads=4).requires_grad_(False)
        made.attn.qkv.weight.mul_(4)
    return made


def given(reducer, tokens):
    """What the reducer is called with: tokens and evidence, of a block's attention where it acts inside one."""
    if reducer.place == "inside":
        return block().attend(tokens, reducer.needs)
    return tokens, Evidence()


def calibrated(make, tokens):
    """A reducer after a few training steps, so that evaluation uses its stored threshold."""
    reducer = make(4).train()
    for _ in range(3):
        reducer(*given(reducer, tokens))
    return reducer.eval()


def inputs(reducer):
    return [dense_tokens()] if reducer.needs_grid else [dense_tokens(), ragged_tokens()]


@pytest.fixture(params=["fresh", "calibrated"])
def reducer(request, make):
    return make(4).eval() if request.param == "fresh" else calibrated(make, dense_tokens(64))


def test_an_image_is_independent_of_its_batch(reducer):
    for tokens in inputs(reducer):
        together = reducer(*given(reducer, tokens)).tokens
        for whole, image in zip(together.split(), tokens.split(), strict=True):
            alone = reducer(*given(reducer, image)).tokens
            assert torch.equal(alone.lengths, whole.lengths)
            assert torch.equal(alone.source, whole.source)
            torch.testing.assert_close(alone.size, whole.size, rtol=0 if reducer.averages else 1e-6, atol=0)
            torch.testing.assert_close(alone.features, whole.features, rtol=1e-5, atol=1e-5)


def test_what_is_restored_is_independent_of_its_batch(reducer):
    for tokens in inputs(reducer):
        together = reducer(*given(reducer, tokens))
        if together.restore is None:
            continue
        restored = together.restore(together.tokens.features)
        assert restored.shape == tokens.features.shape
        for whole, image in zip(restored.split(tokens.lengths.tolist()), tokens.split(), strict=True):
            alone = reducer(*given(reducer, image))
            torch.testing.assert_close(alone.restore(alone.tokens.features), whole, rtol=1e-5, atol=1e-5)


def test_two_passes_agree(reducer):
    for tokens in inputs(reducer):
        first, second = (reducer(*given(reducer, tokens)).tokens for _ in range(2))
        assert torch.equal(first.features, second.features) and torch.equal(first.source, second.source)


def test_patches_are_conserved_and_followed(reducer):
    for tokens in inputs(reducer):
        out = reducer(*given(reducer, tokens)).tokens
        assert out.layout.total < tokens.layout.total
        assert out.layout.total == out.lengths.sum() == len(out.features) and out.layout.longest == out.lengths.max()
        for image in out.split():
            prefix = image.num_prefix
            assert (image.size[:prefix] == 1).all()
            if not reducer.drops:
                assert float(image.size[prefix:].sum()) == pytest.approx(GRID[0] * GRID[1], rel=1e-6)
            if not reducer.drops and (reducer.averages or not reducer.needs_grid) and not reducer.soft:
                counted = torch.bincount(image.source, minlength=len(image.size) - prefix)
                assert torch.equal(counted.float(), image.size[prefix:])


def test_features_are_the_means_that_source_describes(reducer):
    if not reducer.averages:
        pytest.skip("its tokens are no means of the patches that source names")
    tokens, evidence = given(reducer, dense_tokens())
    out = reducer(tokens, evidence).tokens
    assert torch.equal(out.prefix_features()[:, :PREFIX], tokens.prefix_features())
    if not reducer.averages:
        return
    for before, after in zip(tokens.split(), out.split(), strict=True):
        patches, weights = before.features[PREFIX:], weights_of(reducer, before)
        for index in range(len(after.size) - after.num_prefix):
            mine = after.source == index
            mean = (patches[mine] * weights[mine, None]).sum(0) / weights[mine].sum()
            torch.testing.assert_close(after.features[after.num_prefix + index], mean)


def test_the_task_s_gradient_reaches_every_parameter(make):
    # By exact segments, which there are in training only, or by what masked tokens would have been worth.
    in_training_only = getattr(make(4), "imitate", False) or make(4).masks
    for mode in (True,) if in_training_only else (True, False):
        reducer = make(4).train(mode)
        tokens = dense_tokens(32)
        features = tokens.features.requires_grad_()
        out = reducer(*given(reducer, tokens))
        made = out.tokens.features if out.restore is None else out.restore(out.tokens.features)
        made = block()(out.tokens).features if reducer.masks else made
        task = (made * torch.randn_like(made)).sum()
        torch.stack([task, *out.losses.values()]).sum().backward()
        assert features.grad.isfinite().all() and features.grad.any()
        for name, parameter in reducer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_keep_everything_equals_dense(make):
    reducer = make(1)
    if reducer.soft:
        pytest.skip("a soft method hands no token on as it is")
    for mode in (False, True, False):  # never calibrated, in training, calibrated
        tokens, evidence = given(reducer, dense_tokens())
        out = reducer.train(mode)(tokens, evidence).tokens
        kept = out.unpool().view(len(tokens.lengths), -1, D)
        dense = tokens.features.view(len(tokens.lengths), -1, D)[:, PREFIX:]
        torch.testing.assert_close(kept, dense)


def test_the_nominal_rate_is_kept_at_initialisation(make):
    reducer = make(4)
    tokens = dense_tokens(256)
    for mode in (True, False):
        out = reducer.train(mode)(*given(reducer, tokens)).tokens
        rate = float((out.lengths - out.num_prefix).sum() / (256 * GRID[0] * GRID[1]))
        # A rate loss only pulls in training; at initialisation its bias alone is right on average.
        steered = getattr(reducer, "rate", "quantile") != "quantile" and mode
        if not reducer.holds_rate:
            return
        nominal = 1.0 if reducer.masks and mode else NOMINAL.get(type(reducer), 0.25)
        assert abs(rate - nominal) < (0.06 if steered else 0.02), (mode, rate)


def test_save_and_load_keep_the_decisions(make):
    tokens = dense_tokens(32)
    one = calibrated(make, tokens)
    other = make(4).eval()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one(*given(one, tokens)).tokens.source, other(*given(other, tokens)).tokens.source)


def test_bfloat16_decides_like_float32(make):
    reducer = calibrated(make, dense_tokens(64))
    tokens, evidence = given(reducer, dense_tokens(32))  # evidence is float32 whatever the block's type
    expected = reducer(tokens, evidence).tokens
    rounded = tokens.with_features(tokens.features.bfloat16())
    found = copy.deepcopy(reducer).to(torch.bfloat16)(rounded, evidence).tokens
    assert found.features.dtype == torch.bfloat16 and found.size.dtype == torch.float32
    if reducer.soft:  # nothing is decided
        torch.testing.assert_close(found.features.float(), expected.features, rtol=0.05, atol=0.05)
    else:
        assert (starts_of(found) == starts_of(expected)).double().mean() >= 0.99
    for name, buffer in copy.deepcopy(reducer).to(torch.bfloat16).state_dict().items():
        free = "boundary" not in name or "null" in name
        assert free or buffer.dtype == torch.float32, name
    if isinstance(reducer, DynamicPooling):  # the very same features decide the very same way, whatever their type
        again = reducer(rounded.with_features(rounded.features.float()), Evidence()).tokens
        assert torch.equal(again.source, found.source)


def starts_of(tokens):
    """Whether each patch is in another token than the one before it on the raster line."""
    return torch.cat([image.source.diff() != 0 for image in tokens.split()])


def test_names_of_predictors_say_boundary(make):
    reducer = make(4)
    assert not isinstance(reducer, BoundaryPooling) or all("boundary" in name for name in reducer.state_dict())


def test_hierarchy_and_order_of_the_line():
    """A second reducer cuts the line that the first one left, whatever its own order."""
    reducers = {1: DynamicPooling(24, compression=2), 2: DynamicPooling(24, compression=2, order="serpentine")}
    encoder = VisionEncoder(image_size=48, patch_size=8, dim=24, depth=3, num_heads=2, reducers=reducers).eval()
    encoding = encoder(torch.randn(3, 3, 48, 48))
    assert encoding.tokens.lengths.tolist() == [10, 10, 10]  # 36 -> 18 -> 9, and the class token
    assert [block.attention.longest for block in encoding.layouts] == [37, 19, 10]
    assert encoding.compression == {1: 2.0, 2: 2.0}


def test_grid_pooling_twice_and_off_the_grid():
    tokens = dense_tokens()
    once = GridPooling(D)(tokens, Evidence()).tokens
    assert once.grid == (3, 3)
    assert GridPooling(D)(once, Evidence()).tokens.grid == (2, 2)
    with pytest.raises(ValueError, match="form a grid"):
        GridPooling(D)(ragged_tokens(), Evidence())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 0.5}, "at least 1"),
        ({"compression": 2, "order": "zigzag"}, "expected one of raster"),
        ({"compression": 2, "router": "oracle"}, "expected one of mlp"),
        ({"compression": 2, "rate": "hope"}, "expected quantile"),
        ({"compression": 2, "rate": "ratio"}, "with rate 'ratio' use another"),
        ({"compression": 2, "rate": "ratio", "budget": "fixed"}, "nothing to hold"),
        ({"compression": 2, "budget": "free"}, "dynamic or fixed"),
        ({"compression": 2, "estimator": "x"}, "dtp, symmetric"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicPooling(D, **options)


def test_training_without_a_seed_is_refused():
    tokens = Tokens.from_dense(torch.randn(2, 7, D), num_prefix=1, grid=(2, 3))
    with pytest.raises(ValueError, match=r"tokens\.seed"):
        DynamicPooling(D, compression=2).train()(tokens, Evidence())
