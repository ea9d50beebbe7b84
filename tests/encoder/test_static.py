"""Static shapes: with a fixed budget the whole encoder is one compiled graph, and half precision stays close."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dtpvit.encoder import (
    DualEncoder,
    NativeSegmentationEncoder,
    NeighbourhoodEncoder,
    Tokens,
    VisionEncoder,
    VisualTower,
)
from dtpvit.encoder.layers import Block
from dtpvit.encoder.ops.exportable import means_by_product, ranks_by_counting
from dtpvit.encoder.ops.segments import Segments, pool_segments
from dtpvit.encoder.reducers import (
    DynamicPooling,
    DynamicViT,
    Evidence,
    EViT,
    FixedStride,
    GridPooling,
    PiToMe,
    RandomBoundaries,
    SpatialGrouping,
    ToDo,
    TokenLearner,
    ToMe,
    ToMeSD,
    TopK,
    WindowedToMe,
)


def fixed(**options):
    return {1: lambda dim: DynamicPooling(dim, compression=4, budget="fixed", **options)}


def learner(**options):
    return lambda dim: TokenLearner(dim, num_tokens=4, **options)


# Everything but the code generator, which takes ten seconds a graph, is the same with aot_eager.
ENCODERS = {
    "dense": {"drop_path": 0.2},
    "fixed": {"reducers": fixed()},
    "mean": {"reducers": fixed(), "readout": "mean"},
    "symmetric": {"reducers": fixed(estimator="symmetric")},
    "dtp": {"reducers": fixed(estimator="dtp", order="raster", temperature=1.0)},
    "cosine": {"reducers": fixed(router="cosine", null_token=True)},
    "minimum variance": {"reducers": {1: lambda dim: DynamicPooling(dim, compression=8, router="minimum_variance")}},
    "twice": {"reducers": {**fixed(), 2: lambda dim: DynamicPooling(dim, compression=2, budget="fixed")}},
    "stride": {"reducers": {1: lambda dim: FixedStride(dim, compression=4, order="serpentine")}},
    "grid": {"reducers": {1: GridPooling}},
    "tome": {"reducers": {block: lambda dim: ToMe(dim, r=7) for block in range(3)}},
    "pitome": {"reducers": {0: lambda dim: PiToMe(dim, r=7), 1: lambda dim: PiToMe(dim, ratio=0.8, protect=False)}},
    "evit": {"reducers": {block: lambda dim: EViT(dim, keep=0.6) for block in range(3)}},
    "top-k": {"reducers": {block: lambda dim: TopK(dim, keep=0.6) for block in range(3)}},
    "dynamic-vit": {"reducers": {block: lambda dim: DynamicViT(dim, keep=0.3) for block in (0, 2)}},
    "entropy": {"reducers": fixed(router="entropy")},
    "windowed tome": {"reducers": {1: lambda dim: WindowedToMe(dim, matching="two_rounds"), 2: WindowedToMe}},
    "grouping": {"reducers": {1: SpatialGrouping, 2: lambda dim: SpatialGrouping(dim, scope="dense")}},
    "random": {"reducers": {1: lambda dim: RandomBoundaries(dim, compression=4, budget="fixed")}},
    "tomesd": {"reducers": {block: lambda dim: ToMeSD(dim, ratio=0.5, random=True) for block in range(3)}},
    "todo": {"reducers": {0: ToDo, 1: lambda dim: ToDo(dim, method="max_pool"), 2: lambda dim: ToDo(dim, factor=3)}},
    "token learner": {"reducers": {1: lambda dim: TokenLearner(dim, num_tokens=5, version="1.0"), 2: learner()}},
    "token fuser": {"reducers": {1: learner(fuse=True), 2: learner(fuse=True)}},
}


def small(**options):
    return VisionEncoder(**({"image_size": 48, "patch_size": 8, "dim": 24, "depth": 3, "num_heads": 2} | options))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(encoder, run, images):
    """Features and every gradient of one step of ``run``, on random numbers that are the same each time."""
    torch.manual_seed(1)
    encoding = run(images, seeds=torch.arange(len(images)))
    weight = torch.linspace(-1, 1, encoding.pooled.numel()).view_as(encoding.pooled)
    (encoding.pooled * weight).sum().backward()
    grads = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    for reducer in encoder.reducers.values():
        reducer.after_backward()
    return encoding, grads


def assert_same_step(one, two):
    (found, grads), (expected, wanted) = one, two
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-5)
    assert torch.equal(found.tokens.source, expected.tokens.source)
    for name, grad in wanted.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(
                grads[name], grad, rtol=0, atol=1e-4 * max(1.0, float(grad.abs().max())), msg=name
            )


def check_compiled(arguments, backend, **compiling):
    encoder = small(**arguments).train()
    twin = copy.deepcopy(encoder)
    compiled = torch.compile(encoder, fullgraph=True, backend=backend, **compiling)
    for _ in range(2):  # the second step knows the gradient baseline of the first
        images = torch.randn(4, 3, 48, 48)
        assert_same_step(trained(encoder, compiled, images), trained(twin, twin, images))
        encoder.zero_grad()
        twin.zero_grad()
    for one, two in zip(encoder.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    encoder.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).pooled, twin(images).pooled, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convolution", "merging", "grouping"])
def test_an_encoder_of_levels_is_one_graph(kind):
    sizes = {"image_size": 32, "dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "kernel_size": 3}
    merging = {"matching": "two_rounds"} if kind == "merging" else None
    made = NativeSegmentationEncoder(**sizes) if kind == "grouping" else NeighbourhoodEncoder(**sizes, merging=merging)
    made.train()
    twin = copy.deepcopy(made)
    compiled, images = torch.compile(made, fullgraph=True, backend="aot_eager"), torch.randn(4, 3, 32, 32)
    assert_same_step(trained(made, compiled, images), trained(twin, twin, images))


QUICK = ("fixed", "symmetric", "random", "tome", "pitome", "tomesd", "token fuser", "evit", "dynamic-vit")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ENCODERS])
def test_a_whole_encoder_is_one_graph(name):
    check_compiled(ENCODERS[name], "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ENCODERS)
def test_a_whole_encoder_is_one_graph_of_generated_code(name):
    check_compiled(ENCODERS[name], "inductor", options={"fallback_random": True})


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, at a graph break
@pytest.mark.parametrize("name", ["fixed", "dynamic", "tome", "tomesd", "todo", "token fuser", "evit", "dynamic-vit"])
def test_checkpointed_blocks_compile_and_a_dynamic_budget_in_pieces(name):
    dynamic = {"reducers": {1: lambda dim: DynamicPooling(dim, compression=4)}}
    encoder = small(**ENCODERS.get(name, dynamic)).train()
    encoder.set_grad_checkpointing()
    twin = copy.deepcopy(encoder)
    compiled = torch.compile(encoder, fullgraph=name != "dynamic", backend="aot_eager")
    for _ in range(2):
        images = torch.randn(4, 3, 48, 48)
        assert_same_step(trained(encoder, compiled, images), trained(twin, twin, images))


@pytest.mark.parametrize("train", [False, True])
def test_other_images_compile_nothing_anew(train):
    counter = CompileCounter()
    encoder = small(reducers=fixed()).train(train)
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)
    seen = set()
    for _ in range(4):
        encoding = compiled(torch.randn(3, 3, 48, 48), seeds=torch.randint(1 << 40, (3,)))
        seen.add(tuple(encoding.tokens.source.tolist()))
    assert counter.frame_count == 1 and len(seen) == 4


def test_a_block_is_one_graph_on_ragged_batches_too():
    block = Block(24, num_heads=2, drop_path=0.1).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    reducer = RandomBoundaries(24, compression=2).eval()
    for train in (False, True):
        block.train(train)
        for seed in range(2):
            dense = Tokens.from_dense(torch.randn(4, 31, 24), num_prefix=1, seed=torch.arange(4) + 10 * seed)
            ragged = reducer(dense, Evidence()).tokens
            assert not ragged.layout.uniform
            for tokens in (dense, ragged):
                results = []
                for run in (block, compiled):
                    torch.manual_seed(1)
                    features = tokens.features.detach().requires_grad_()
                    out = run(tokens.with_features(features)).features
                    (grad,) = torch.autograd.grad(out.square().sum(), features)
                    results.append((out, grad))
                for one, two in zip(*results, strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_exported_operations_equal_the_eager_ones():
    encoder = small(reducers=fixed())
    tokens = encoder.embed(torch.randn(5, 3, 48, 48))
    reducer = encoder.reducers["1"].eval()
    order = reducer.line(tokens)
    starts = (torch.rand(5, 37).argsort(1).argsort(1) < 8).float()
    starts[:, :2] = 1  # the class token and the first patch
    counts = starts.sum(1, keepdim=True)
    starts = torch.where((starts.cumsum(1) > counts.min()), torch.zeros_like(starts), starts).flatten()
    size = torch.randint(1, 5, starts.shape).float()
    segments = Segments.of(starts, int(starts.sum()), size, tokens.layout.opening, order)
    found = means_by_product(tokens.features, segments, 5)
    torch.testing.assert_close(found, pool_segments(tokens.features, starts, segments), rtol=1e-5, atol=1e-6)
    cells = torch.randint(6, (5, 40)).float()  # many ties
    cells[:, 0], cells[:, -2:] = float("inf"), float("-inf")
    assert torch.equal(ranks_by_counting(cells), cells.argsort(dim=1, descending=True, stable=True).argsort(1))


def test_the_budget_can_be_fixed_afterwards():
    encoder = small(reducers={1: lambda dim: DynamicPooling(dim, compression=4)})
    encoder.train()(torch.randn(8, 3, 48, 48))
    images = torch.randn(8, 3, 48, 48)
    before = encoder.eval()(images)
    encoder.reducers["1"].fix_budget()
    after = encoder(images)
    assert len(set(before.tokens.lengths.tolist())) > 1 and set(after.tokens.lengths.tolist()) == {10}
    twin = small(reducers=fixed())
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(twin.eval()(images).pooled, after.pooled)


def dual(**options):
    text = {"context_length": 8, "vocab_size": 100, "width": 24, "heads": 2, "layers": 2}
    return DualEncoder(VisualTower(small(**options), 16), 16, text=text)


def alike(found, expected, least=0.99):
    assert found.isfinite().all()
    return torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=-1).min() > least


BUDGETS = {"fixed": fixed(), "dynamic": {1: lambda dim: DynamicPooling(dim, compression=4)}}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("cast", [False, True])
def test_both_towers_in_bfloat16_are_close_to_float32(budget, cast):
    model = dual(reducers=BUDGETS[budget], pre_norm=True).eval()
    images, text = torch.randn(6, 3, 48, 48), torch.randint(1, 100, (6, 8))
    with torch.no_grad():
        expected = model(images, text)
        if cast:
            found = copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16(), text)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = model(images, text)
    assert alike(found[0], expected[0]) and alike(found[1], expected[1])


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_contrastive_step_in_mixed_precision_has_the_gradients_of_float32(budget):
    model = dual(reducers=BUDGETS[budget]).train()
    images, text = torch.randn(8, 3, 48, 48), torch.randint(1, 100, (8, 8))
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            image, words, scale = model(images, text)
            loss = torch.nn.functional.cross_entropy(scale * image @ words.T, torch.arange(8))
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert all(p.grad is not None for n, p in model.named_parameters() if "boundary" in n)
    assert grads[0].keys() == grads[1].keys()
    flat = [torch.cat([g.flatten() for n, g in step.items() if "boundary" not in n]) for step in grads]
    assert alike(flat[1], flat[0], least=0.98)
    assert all(grad.isfinite().all() for grad in grads[1].values())


def test_a_compiled_encoder_in_mixed_precision_is_close_to_eager():
    encoder = small(reducers=fixed()).train()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    images = torch.randn(4, 3, 48, 48)
    results = []
    for run in (encoder, compiled):
        encoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(trained(encoder, run, images))
    assert torch.equal(results[0][0].tokens.source, results[1][0].tokens.source)
    assert alike(results[1][0].pooled, results[0][0].pooled, least=0.999)
    for name, grad in results[1][1].items():
        assert grad.isfinite().all(), name
