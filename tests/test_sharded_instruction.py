"""Instruction tuning with the language model cut between two processes ends where one process does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import sharded_instruction_checks as checks
from rank_checks import close, found, ran

from dtpvit.tasks.instruction import Instruction

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = ran(checks.CHECKS, tmp_path_factory.mktemp("tuned"))
    return ran(checks.AFTERWARDS, folder)


def check_same(found, expected, tolerance=1e-4):
    """Weights of a dtype at a time, whose largest value says what is close."""
    assert list(found) == list(expected)
    for dtype in {value.dtype for value in expected.values()}:
        names = [name for name, value in expected.items() if value.dtype == dtype]
        close({name: found[name] for name in names}, {name: expected[name] for name in names}, tolerance)


@pytest.mark.parametrize("name", checks.CASES)
def test_sharded_tuning_ends_where_one_process_does(name, tuned):
    (one, figures, _), two = found(tuned, name)
    torch.testing.assert_close(two[0][0], two[1][0], rtol=0, atol=0, equal_nan=True)
    for state, validated, _ in two:
        check_same(state, one, 1e-2 if name.startswith("half") else 1e-4)
        assert validated == pytest.approx(figures, rel=2e-3 if name.startswith("half") else 1e-4)
    assert figures["val/conversations"] == 4 and figures["val/answers"] == 4


def test_the_language_model_is_cut_and_the_projector_is_whole(tuned):
    for name in checks.CASES:
        (one, _, _), ((_, _, apart), _) = found(tuned, name)
        layers = [n for n in apart if ".layers." in n and "language_model" in n]
        whole = [n for n in one if ".layers." in n and "language_model" in n and f"model.{n}" not in apart]
        ends = [n for n in apart if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
        assert len(layers) >= 18 and not whole
        assert len(ends) == (2 if name == "untied" else 1)
        assert any("vision.blocks.0.attn" in n for n in apart)
        assert not any(part in n for n in apart for part in ("projector", "reducers", ".model.norm", "vision.norm"))


def test_a_step_that_is_no_number_on_one_rank_is_left_out_on_both(tuned):
    one, two = found(tuned, "spoilt")
    assert one == two[0] == two[1] == [2, []]


def test_the_checkpoint_of_sharded_tuning_is_that_of_any_other(tuned):
    ours, theirs = (torch.load(tuned / f"adamw-{world}.ckpt", weights_only=True) for world in (2, 1))
    assert set(ours) == set(theirs)
    assert all(ours[part] == theirs[part] for part in ("lr_schedulers", "callbacks", "nonfinite"))
    check_same(ours["state_dict"], theirs["state_dict"])
    for mine, expected in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert mine["param_groups"] == expected["param_groups"]
        for number, state in expected["state"].items():
            close(mine["state"][number], state, 1e-3)
    again = Instruction.load_from_checkpoint(tuned / "adamw-2.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), ours["state_dict"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", checks.RESUMED)
def test_a_sharded_average_of_a_language_model_goes_on_sharded_or_not(name, tuned):
    """On as many ranks as before to the bit, for the checkpoint has all that there is."""
    one, two = found(tuned, f"averaged_{name}")
    for source in (1, 2):
        alone, ranks = found(tuned, f"{name}_from_{source}")
        for state, figures, _ in (alone, *ranks):
            check_same(state, one[0])
            assert figures == pytest.approx(one[1], rel=1e-4)
        resumed, expected = (alone, one) if source == 1 else (ranks[0], two[0])
        torch.testing.assert_close(resumed[:2], expected[:2], rtol=0, atol=0, equal_nan=True)


def test_an_average_leaves_out_what_is_frozen_of_the_language_model(tuned):
    for world in (1, 2):
        saved = torch.load(tuned / f"adapters-{world}.ckpt", weights_only=True)
        for part in ("state_dict", "current_model_state"):
            words = [name for name in saved[part] if name.startswith("language_model.")]
            assert words and all("lora_" in name for name in words)
        assert any(
            not torch.equal(value, saved["current_model_state"][name]) for name, value in saved["state_dict"].items()
        )
