"""DToMe against a slow reference with loops, written from the description of the method; and its thresholds."""

import copy
import socket
from datetime import timedelta

import pytest
import torch
from slow_merging import assert_equals_slow_reference, assert_merges_like, cosine, random_tokens, slow_encode, small

from dtpvit.encoder.reducers import DToMe, DynamicPooling, Evidence
from dtpvit.evaluation.cost import image_cost
from dtpvit.tasks.accumulation import joint_thresholds


def proposals_of(keys, num_prefix):
    """(cosine, a, b) of each even place a that may propose, b its best odd place."""
    found = []
    for a in range(num_prefix + num_prefix % 2, len(keys), 2):
        odds = range(num_prefix + 1 - num_prefix % 2, len(keys), 2)
        partner = max(odds, key=lambda b: cosine(keys[a], keys[b]), default=None)
        if partner is not None:
            found.append((cosine(keys[a], keys[partner]), a, partner))
    return found


def slow_matching(accept, seen=None):
    """Pairs (a, b) that ``accept`` takes of the proposals, and the order prefix, even places, odd places."""

    def match(keys, num_prefix):
        found = sorted(proposals_of(keys, num_prefix), key=lambda edge: -edge[0])
        if seen is not None:
            seen.extend(score for score, _, _ in found)
        places = [i for i in range(len(keys)) if i % 2 == 0] + [i for i in range(len(keys)) if i % 2 == 1]
        order = list(range(num_prefix)) + [i for i in places if i >= num_prefix]
        return [(a, b) for _, a, b in accept(found)], order

    return match


def above(threshold, max_r=None):
    return lambda found: [edge for edge in found if edge[0] >= threshold - 3e-7][:max_r]  # evidence is float32


def dtome(rates, **options):
    return small({block: DToMe(24, r=rate, **options) for block, rate in enumerate(rates)})


def thresholds_of(encoder):
    return [float(reducer.calibration.threshold) for reducer in encoder.reducers.values()]


@pytest.mark.parametrize("max_r", [None, 8])
def test_it_equals_the_slow_reference_gradients_included(max_r):
    """Training: the lowest of the best r an image of the whole batch. Evaluation: all that reach it."""
    encoder = dtome((6, 3, 5), max_r=max_r).double().train()
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    twin = copy.deepcopy(encoder)
    twin(images)
    thresholds = thresholds_of(twin)
    matchings = [slow_matching(above(threshold, max_r)) for threshold in thresholds]
    encoding = assert_equals_slow_reference(encoder, images, matchings)
    lost = 4 * 37 - encoding.layouts[0].mlp.total
    assert len(set(encoding.layouts[0].mlp.lengths.tolist())) > 1 and (lost == 24 if max_r is None else lost <= 24)
    seen = [list[float](), list[float](), list[float]()]
    recording = [slow_matching(above(t, max_r), s) for t, s in zip(thresholds, seen, strict=True)]
    for image in images:
        slow_encode(encoder, image, recording)
    for rate, threshold, scores in zip((6, 3, 5), thresholds, seen, strict=True):
        assert threshold == pytest.approx(sorted(scores, reverse=True)[4 * rate - 1], abs=1e-6)
    assert_equals_slow_reference(encoder.eval(), images[:2], matchings)  # two of four


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("lengths", [[9, 9], [3, 12, 7, 4], [3]])
def test_any_prefix_and_any_lengths(num_prefix, lengths):
    tokens, keys = random_tokens(lengths, num_prefix)
    reducer = DToMe(6, r=2)
    best = slow_matching(lambda found: found[:2])
    assert_merges_like(reducer.eval(), best, tokens, keys)  # never calibrated: each image's own best
    reducer.train()(tokens, Evidence(keys=keys))
    threshold = float(reducer.calibration.threshold)
    everything = [edge[0] for own in keys.split(lengths) for edge in proposals_of(own, num_prefix)]
    if everything:
        count = min(len(everything), 2 * len(lengths))
        assert threshold == pytest.approx(sorted(everything, reverse=True)[count - 1], abs=1e-6)
        assert_merges_like(reducer.eval(), slow_matching(above(threshold)), tokens, keys)


@pytest.mark.parametrize("training", [False, True])
def test_a_lone_token_proposes_nothing(training):
    tokens, keys = random_tokens([1, 1], 0)
    reducer = DToMe(6, r=2).train(training)
    assert reducer(tokens, Evidence(keys=keys)).tokens.lengths.tolist() == [1, 1] and not reducer.calibration.steps


def test_a_plain_image_loses_more_than_a_busy_one():
    encoder = dtome((9, 9, 9)).train()
    coarse = torch.nn.functional.interpolate(torch.randn(4, 3, 2, 2), size=(48, 48), mode="bilinear")
    encoder(torch.cat((coarse, torch.randn(4, 3, 48, 48))))
    lengths = encoder.eval()(torch.cat((coarse, torch.randn(4, 3, 48, 48)))).tokens.lengths
    assert lengths[:4].max() < lengths[4:].min()


def test_thresholds_are_running_means_that_skip_steps_without_number():
    reducer = DToMe(24, r=1)
    for step in (0.5, 0.7, float("nan"), 0.3):
        reducer.set_threshold(torch.tensor([[step, -torch.inf]]), 2, 1)
    assert float(reducer.calibration.threshold) == pytest.approx(0.5) and float(reducer.calibration.steps) == 3
    reducer.set_threshold(torch.full((1, 4), -torch.inf), 4, 1)  # nobody proposes
    assert float(reducer.calibration.steps) == 3
    for _ in range(1000):
        reducer.set_threshold(torch.tensor([[0.9]]), 2, 1)
    assert float(reducer.calibration.threshold) == pytest.approx(0.9, abs=1e-3)
    assert copy.deepcopy(reducer).bfloat16().calibration.threshold.dtype == torch.float32


def test_calibration_without_training():
    """Only the reducers in training mode, no gradient: what the documentation says."""
    encoder = small({0: DToMe(24, r=4), 2: DToMe(24, r=6)}, drop_path=0.5)
    encoder.eval().reducers.train()
    before = copy.deepcopy(dict(encoder.named_parameters()))
    with torch.no_grad():
        for _ in range(8):
            encoder(torch.randn(16, 3, 48, 48))
    encoding = encoder.eval()(torch.randn(64, 3, 48, 48))
    assert all(torch.equal(parameter, before[name]) for name, parameter in encoder.named_parameters())
    lost = [4, 4, 10]
    for seen, expected in zip(encoding.layouts, lost, strict=True):
        assert 37 - float(seen.mlp.lengths.double().mean()) == pytest.approx(expected, abs=0.5)


def test_micro_batches_have_one_threshold():
    encoder = small({0: DToMe(24, r=4), 1: DynamicPooling(24, compression=2), 2: DToMe(24, r=3)}).train()
    twin = copy.deepcopy(encoder)
    images, seeds = torch.randn(6, 3, 48, 48), torch.arange(6)
    found = joint_thresholds(encoder, list(images.split(2)), list(seeds.split(2)))
    whole = twin(images, seeds=seeds)
    assert set(found) == {0, 1, 2}
    for block in (0, 2):
        calibration = twin.reducers[str(block)].calibration
        torch.testing.assert_close(found[block], calibration.threshold, rtol=0, atol=1e-6)
        assert torch.equal(encoder.reducers[str(block)].calibration.threshold, found[block])
    parts = zip(images.split(2), seeds.split(2), strict=True)
    pieces = [encoder(part, seeds=seed, thresholds=found).tokens.lengths for part, seed in parts]
    assert torch.equal(torch.cat(pieces), whole.tokens.lengths)


def _rank(rank, folder, port):
    import torch.distributed as dist

    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=patience)
    scores = torch.load(folder / "scores.pt", weights_only=True)[:, : 5 if rank == 0 else None]
    scores = scores if rank == 0 else scores[:, 5:]
    reducer = DToMe(24, r=2)
    threshold = reducer.set_threshold(scores, scores.shape[1], 1 + rank)
    found = torch.stack((threshold, reducer.calibration.threshold))
    # A batch with nothing to merge beside one with something: each waits for the other's scores.
    torch.manual_seed(0)
    tokens, keys = random_tokens([[2, 2], [9, 9]][rank], 1)
    other = DToMe(6, r=2).train()
    left = other(tokens, Evidence(keys=keys)).tokens.lengths
    torch.save({"found": found, "left": left, "tiny": other.calibration.threshold}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_have_one_threshold(tmp_path):
    scores = torch.randn(1, 14)
    torch.save(scores, tmp_path / "scores.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(tmp_path, port), nprocs=2)
    expected = scores[0].sort(descending=True).values[5]  # three images lose two each
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(rank["found"], expected.expand(2)) for rank in found)
    assert found[0]["left"].tolist() == [2, 2] and found[1]["left"].sum() == 10  # all eight merges fall to the second
    assert torch.equal(found[0]["tiny"], found[1]["tiny"]) and found[0]["tiny"].isfinite()


def test_the_cost_is_that_of_the_cosines():
    encoder = dtome((6, 0, 5)).eval()
    encoding = encoder(torch.randn(3, 3, 48, 48))
    cost = image_cost(encoder, encoding.layouts)
    last = encoding.layouts[2].attention.lengths.double()
    pairs = 19 * 18 + (last / 2).ceil() * (last / 2).floor()
    assert torch.equal(cost.reducers, 12 * pairs)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"r": -1}, "expected a whole number"), ({"r": 3, "max_r": 2}, "expected at least r")]
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DToMe(8, **arguments)
