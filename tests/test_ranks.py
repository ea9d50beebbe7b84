"""Two processes together do what one does alone, in everything that crosses from rank to rank."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import rank_checks
from rank_checks import close, found, ran


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Everything at once: processes take longer to start than to check."""
    return ran(rank_checks.CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["softmax", "gathered", "sigmoid", "sigmoid_pieces", "two_batches"])
def test_losses_and_gradients_are_those_of_the_joined_batch(name, together):
    one, two = found(together, name)
    for rank in two:
        assert set(rank["grads"]) == set(one["grads"])
        for key, grad in rank["grads"].items():
            close({key: grad}, {key: one["grads"][key]}, 2e-5)
        torch.testing.assert_close(rank["threshold"], one["threshold"])
    torch.testing.assert_close(torch.stack([rank["loss"] for rank in two]).mean(), one["loss"])


@pytest.mark.parametrize("name", [path.stem for path in rank_checks.FRAGMENTS])
def test_reducers_decide_and_learn_over_all_ranks(name, together):
    one, two = (found(together, "reducers")[0][name], [rank[name] for rank in found(together, "reducers")[1]])
    assert torch.equal(torch.cat([rank["lengths"] for rank in two]), one["lengths"])
    for rank in two:
        torch.testing.assert_close(rank["state"], one["state"], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert all(
            torch.equal(value.nan_to_num(), two[0]["state"][key].nan_to_num()) for key, value in rank["state"].items()
        )


def test_a_step_that_is_no_number_on_one_rank_is_left_out_on_all(together):
    one, two = found(together, "guard")
    assert one == two[0] == two[1] == [(True, 1, 1), (False, 1, 0), (True, 2, 1)]


def test_a_rank_may_have_nothing_to_add(together):
    (columns, sums), two = found(together, "collectives")
    assert all(torch.equal(rank[0], columns) and rank[1] == sums == [3, 4] for rank in two)


def test_validation_counts_every_sample_once(together):
    one, two = found(together, "validation")
    assert two[0] == two[1] == pytest.approx(one, rel=1e-5)
    assert {"val/zeroshot_acc1", "val/text_retrieval_recall@5", "val/tokens"} <= set(one)
    assert (one["val/pairs"], one["val/zeroshot_images"]) == (11, 9)
    assert one["val/zeroshot_acc1"] * 9 == pytest.approx(round(one["val/zeroshot_acc1"] * 9))


def test_averaged_weights_are_the_same_on_all_ranks(together):
    one, two = found(together, "average")
    torch.testing.assert_close(two[0], two[1], rtol=0, atol=0, equal_nan=True)
    close(two[0], one, 1e-4)


def test_unequal_shards_with_broken_samples_in_one(together):
    """Both ranks take as many steps, and what was skipped is counted over both."""
    (steps, figures, _), two = found(together, "broken")
    assert steps == 9 and [rank[0] for rank in two] == [4, 4]
    assert two[0][1] == two[1][1] and sum(figures.values()) >= 4
    assert set(two[0][1]) == set(figures)
    torch.testing.assert_close(two[0][2], two[1][2], rtol=0, atol=0, equal_nan=True)


def test_a_learning_rate_that_is_too_high_for_one_rank_ends_the_training_of_all(together):
    one, two = found(together, "watched")
    assert one == two[1] == [20, "too high"]
    assert two[0] == [20, "another rank's loss says that the learning rate is too high"]
