"""Two processes with the model cut between them end where one does, and their checkpoints are those of any other."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import sharded_checks
from rank_checks import close, found, ran
from sharded_checks import labelled, pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = ran(sharded_checks.CHECKS, tmp_path_factory.mktemp("sharded"))
    return ran(sharded_checks.AFTERWARDS, folder)


@pytest.mark.parametrize("name", ["clipped", "by_value", "pieces", "symmetric", "sigmoid", "checkpointed", "again"])
def test_sharded_training_ends_where_one_process_does(name, sharded):
    one, (first, second) = found(sharded, f"sharded_{name}")
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert list(first) == list(one)
    close(first, one, 1e-4)


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_a_sharded_classifier_ends_where_one_process_does(mode, sharded):
    (one, figures), two = found(sharded, f"sharded_{mode}")
    assert two[0][1] == two[1][1] == pytest.approx(figures, rel=1e-4)
    close(two[0][0], one, 1e-4)


def test_sharded_steps_are_left_out_together_and_boundaries_stay_precise(sharded):
    (skipped, _, types), two = found(sharded, "sharded_guard")
    start = pairs.task().state_dict()
    for rank in two:
        assert rank[0] == skipped == 2 and rank[2] == types
        for name, value in rank[1].items():
            assert "calibration" in name or torch.equal(value, start[name]), name
    assert {types[name] for name in types if "boundary" in name} == {"torch.float32"}
    assert types["visual.trunk.blocks.0.attn.qkv.weight"] == "torch.bfloat16"


def test_the_checkpoint_of_a_sharded_run_is_that_of_any_other(sharded):
    one, two = (torch.load(sharded / f"sharded-{world}.ckpt", weights_only=True) for world in (1, 2))
    assert set(one) == set(two)
    for ours, theirs in zip(two["optimizer_states"], one["optimizer_states"], strict=True):
        assert ours["param_groups"] == theirs["param_groups"]
        for number, state in theirs["state"].items():
            close(ours["state"][number], state, 1e-3)
    assert one["lr_schedulers"] == two["lr_schedulers"]
    again = pairs.Contrastive.load_from_checkpoint(sharded / "sharded-2.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), two["state_dict"], rtol=0, atol=0, equal_nan=True)


def test_another_task_is_refused(sharded):
    _, two = found(sharded, "refused")
    assert all("can be sharded, and this is BoringModel; leave configs/launch/fsdp.yaml out" in said for said in two)


def test_an_average_of_sharded_weights_is_that_of_one_process_and_itself_sharded(sharded):
    (one, figures, _), two = found(sharded, "average")
    for state, validated, places in two:
        close(state, one, 1e-4)
        assert validated == pytest.approx(figures, rel=1e-4)
        assert all(average == mine for average, mine in places) and len(places) == len(
            list(labelled.task().parameters())
        )


@pytest.mark.parametrize("when", ["average", "within"])
def test_a_checkpoint_has_the_average_and_beside_it_the_weights_to_go_on_from(when, sharded):
    """One is of a training step, the other of a validation, while the model has the average."""
    ours, theirs = (torch.load(sharded / f"{when}-{world}.ckpt", weights_only=True) for world in (2, 1))
    assert set(ours) == set(theirs) and ours["callbacks"] == theirs["callbacks"]
    for part in ("state_dict", "current_model_state"):
        assert list(ours[part]) == list(theirs[part])
        close(ours[part], theirs[part], 1e-4)
    weights, average = ours["current_model_state"], ours["state_dict"]
    assert not torch.allclose(weights["head.weight"], average["head.weight"], rtol=1e-3)


@pytest.mark.parametrize("source", [1, 2])
def test_an_average_goes_on_sharded_or_not(source, sharded):
    """On as many ranks as before to the bit, for the checkpoint has all that there is."""
    (one, figures, _), two = found(sharded, f"average_from_{source}")
    for state, validated, _ in two:
        close(state, one, 1e-4)
        assert validated == pytest.approx(figures, rel=1e-4)
    never_stopped, ranks = found(sharded, "average")
    resumed, expected = ([one, figures], never_stopped[:2]) if source == 1 else (two[0][:2], ranks[0][:2])
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0, equal_nan=True)
