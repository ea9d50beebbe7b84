"""Runs killed by SIGKILL, wherever it strikes, end as the run that nobody killed: every bit, every sample once."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.killed_runs import differences, final_history, fit, start, wait_for
from benchmarks.small_runs import STEPS, logged, write_config, write_images
from dtpvit.interop.weight_files import damage, read_checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Folder and diary of the run of a kind that nobody kills, made when first asked for."""
    base, made = tmp_path_factory.mktemp("whole"), {}

    def run(kind, num_workers, every=2):
        name = f"{kind}-{num_workers}-{every}"
        folder, diary = base / name, base / f"{name}.jsonl"
        if folder not in made:
            given = {"num_workers": num_workers, "diary": {"file": str(diary)}, "every": every}
            made[folder] = fit(write_config(kind, images, folder.with_suffix(".yaml"), **given), folder)
        assert made[folder] == 0, (folder / "log").read_text()
        return folder, diary

    return run


def last(folder: Path) -> Path:
    return folder / "checkpoints/last.ckpt"


def check_same(folder: Path, diary: Path, expected: tuple[Path, Path]) -> None:
    checkpoint = torch.load(last(folder), weights_only=True)
    assert checkpoint["global_step"] == STEPS
    assert differences(checkpoint, torch.load(last(expected[0]), weights_only=True)) == []
    history = final_history(diary)
    assert history == final_history(expected[1]) and len(history) == STEPS
    assert logged(folder / "metrics.csv") == logged(expected[0] / "metrics.csv")
    assert not list(folder.rglob("*.partial")) and not (folder / "earlier").exists()


def killed_and_resumed(kind, num_workers, kills, images, folder):
    """A run killed at each of these (step, moment), and gone on with."""
    diary = folder.with_suffix(".jsonl")
    for step, moment in kills:
        told = {"file": str(diary), "at_step": step, "moment": moment}
        arguments = write_config(kind, images, folder.with_suffix(".yaml"), num_workers=num_workers, diary=told)
        assert fit(arguments, folder) == -9, (folder / "log").read_text()
    told = {"file": str(diary)}
    arguments = write_config(kind, images, folder.with_suffix(".yaml"), num_workers=num_workers, diary=told)
    assert fit(arguments, folder) == 0, (folder / "log").read_text()
    return folder, diary


@pytest.mark.parametrize(
    ("kind", "num_workers", "step", "moment"),
    [
        ("contrastive", 2, 10, "on_train_batch_start"),
        ("classification", 0, 5, "on_before_optimizer_step"),
    ],
)
def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(kind, num_workers, step, moment, images, whole, tmp_path):
    found = killed_and_resumed(kind, num_workers, [(step, moment)], images, tmp_path / "run")
    check_same(*found, whole(kind, num_workers))


def test_each_epoch_has_every_readable_sample_about_once(whole):
    """Seven batches of four of 27 samples: one is seen twice, none is left out."""
    _, diary = whole("classification", 0)
    for epoch in range(3):
        seen = Counter(key for _, when, keys in final_history(diary) if when == epoch for key in keys)
        assert len(seen) == 27 and sum(seen.values()) == 28


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_good_one(images, whole, tmp_path):
    folder, diary = tmp_path / "run", tmp_path / "run.jsonl"
    given = {"num_workers": 0, "diary": {"file": str(diary)}, "every": 1}
    arguments = write_config("contrastive", images, tmp_path / "run.yaml", **given)
    partial = last(folder).with_name("last.ckpt.partial")
    for _ in range(9):  # once in a while the file is whole before the signal arrives
        process = start(arguments, folder)
        assert wait_for(last(folder), process) and wait_for(partial, process), (folder / "log").read_text()
        process.kill()
        process.join()
        assert damage(last(folder)) is None
        if partial.exists():
            break
    assert partial.exists() and 0 < read_checkpoint(last(folder))["global_step"] < STEPS
    assert damage(partial) is not None
    assert fit(arguments, folder) == 0, (folder / "log").read_text()
    check_same(folder, diary, whole("contrastive", 0, every=1))


@pytest.mark.slow
def test_a_run_killed_in_its_validation_ends_bit_for_bit(images, whole, tmp_path):
    found = killed_and_resumed("classification", 0, [(14, "on_validation_start")], images, tmp_path / "run")
    check_same(*found, whole("classification", 0))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("kind", ["contrastive", "classification"])
def test_a_run_killed_twice_at_random_steps_ends_bit_for_bit(kind, num_workers, images, whole, tmp_path):
    draw = random.Random(f"{kind}{num_workers}")
    moments = ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]
    kills = [(step, draw.choice(moments)) for step in sorted(draw.sample(range(1, STEPS - 1), 2))]
    found = killed_and_resumed(kind, num_workers, kills, images, tmp_path / "run")
    check_same(*found, whole(kind, num_workers))
