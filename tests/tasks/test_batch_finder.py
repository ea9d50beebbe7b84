"""Batch sizes tried in turn: what is measured, where it ends, and a task and data that are as they were."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from dtpvit.errors import UserError
from dtpvit.tasks.batch_finder import BatchSizes, Tried, find_batch_size
from dtpvit.tasks.trials import TRIAL

sys.path.insert(0, str(Path(__file__).parent))
import labelled

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


class Sized(labelled.Images):
    """``count`` images, in batches of any size."""

    def __init__(self, count=40, batch_size=8):
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def train_dataloader(self):
        if self.batch_size > self.count:
            raise UserError(f"The {self.count} training samples do not fill one batch of {self.batch_size}.")
        return labelled.Loader(self.count // self.batch_size * self.batch_size, self.batch_size, 0, 1, True)


class Small(L.LightningModule):
    """A task that needs more memory than any machine has from a batch of ``limit`` on."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.seen = limit, []
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def __deepcopy__(self, memo):
        made = type(self)(self.limit)
        made.seen = self.seen  # by the copies too
        return made

    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch["label"]))
        if len(batch["label"]) >= self.limit:
            torch.empty(2**50)
        return (batch["image"].float().mean((2, 3)) * self.weight).mean()

    def validation_step(self, batch, batch_idx):
        raise AssertionError("nothing is validated")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def search(task, data, folder, trainer=None, **options):
    run = labelled.trainer(**TRIAL, default_root_dir=folder, **(trainer or {}))
    return find_batch_size(run, task, data, **options)


def test_a_fit_afterwards_is_one_without(tmp_path):
    weights = []
    for tunes in (False, True):
        task, data, reported = labelled.task(model=labelled.config(drop_path=0.3)), Sized(), []
        torch.manual_seed(5)
        if tunes:
            found = search(task, data, tmp_path, max_batch_size=6, steps_per_trial=2, report=reported.append)
            assert [one.batch_size for one in found.tried] == [2, 4] and tuple(reported) == found.tried
            assert found.ended_by == "max_batch_size is 6."
            assert all(one.speed > 0 and one.memory > 1 for one in found.tried)
        assert data.batch_size == 8
        labelled.fit(task, data, limit_val_batches=0)
        weights.append(labelled.weights(task))
    labelled.check_same(*weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_size_tried_is_the_size_said(pieces, tmp_path):
    """Lightning's own search makes its first trial at the size of the config."""
    task = Small(limit=64)
    trainer = {"accumulate_grad_batches": pieces}
    found = search(task, Sized(60), tmp_path, trainer, max_batch_size=8, steps_per_trial=5)
    assert task.seen == [2] * 6 + [4] * 6 + [8] * 6  # one to begin with and five, two updates of three
    assert found.largest == 8 and found.suggestion in (2, 4, 8)


def test_the_search_ends_where_memory_does(tmp_path):
    task = Small(limit=4)
    found = search(task, Sized(60), tmp_path, steps_per_trial=2)
    assert [(one.batch_size, one.speed is None) for one in found.tried] == [(2, False), (4, True)]
    assert (found.suggestion, found.largest, found.ended_by) == (2, 2, "memory ran out at 4.")
    assert task.seen == [2, 2, 2, 4]
    with pytest.raises(UserError, match="not even 2 images fit into memory"):
        search(Small(limit=1), Sized(60), tmp_path, steps_per_trial=2)


def test_the_search_ends_where_the_data_do(tmp_path):
    found = search(Small(limit=99), data := Sized(3), tmp_path, steps_per_trial=2)
    assert [one.batch_size for one in found.tried] == [2] and data.batch_size == 8
    assert found.ended_by == "The 3 training samples do not fill one batch of 4."
    with pytest.raises(UserError, match="The 1 training samples"):
        search(Small(limit=99), Sized(1), tmp_path)


def test_on_a_cpu_the_search_ends_where_speed_does(tmp_path, monkeypatch):
    """With a clock on which every batch takes as long per image, no doubling brings anything."""
    now, task = [0.0], Small(limit=999)
    step = Small.training_step

    def slow(self, batch, batch_idx):
        now[0] += len(batch["label"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Small, "training_step", slow)
    monkeypatch.setattr("dtpvit.tasks.batch_finder.perf_counter", lambda: now[0])
    found = search(task, Sized(60), tmp_path, steps_per_trial=3)
    assert [(one.batch_size, one.speed) for one in found.tried] == [(2, 1.0), (4, 1.0), (8, 1.0)]
    assert found.suggestion == 2 and "the last two doublings brought less than 5 %" in found.ended_by


def test_the_suggestion_is_the_smallest_that_is_fast_enough(tmp_path):
    speeds = {2: 50.0, 4: 80.0, 8: 96.0, 16: 100.0, 32: None}
    sizes = BatchSizes(
        tuple(Tried(size, speed, 10.0 * size) for size, speed in speeds.items()), "memory ran out at 32."
    )
    assert (sizes.suggestion, sizes.largest) == (8, 16)
    sizes.write(tmp_path / "sizes.csv")
    lines = (tmp_path / "sizes.csv").read_text().splitlines()
    assert lines[0] == "batch_size,images_per_second,peak_memory_mib"
    assert lines[3:] == ["8,96,80", "16,100,160", "32,,320"]


class Unsized(labelled.Images):
    pass


@pytest.mark.parametrize(
    ("data", "trainer", "options", "message"),
    [
        (Unsized, {}, {}, "Unsized has no batch_size to change"),
        (Sized, {}, {"max_batch_size": 1}, "max_batch_size is 1 and steps_per_trial 10"),
        (Sized, {}, {"steps_per_trial": 0}, "steps_per_trial 0; give at least 2 and at least 1"),
        (Sized, {"devices": 2, "strategy": "ddp"}, {}, "on one device, and these are 2; add --trainer.devices 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(data, trainer, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        search(Small(limit=9), data(), tmp_path, trainer, **options)
