"""Gradients that are no numbers beside a gradient scaler: real fp16 on a CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.stability import HalfOnCPU
from dtpvit.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    # The first step of a search is skipped, and the schedule goes on.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]


def fit(task, folder, scale, **options):
    plugin = HalfOnCPU()
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = pairs.fit(task, folder, plugins=[plugin], callbacks=[], default_root_dir=folder, **options)
    return trainer, plugin.scaler.get_scale()


def test_gradients_that_are_never_numbers_stop_a_run_in_half_precision(tmp_path):
    task = pairs.task(max_nonfinite=3, optimizer="adamw")
    task.model.logit_scale.register_hook(lambda grad: grad * float("nan"))  # the loss stays finite
    with pytest.raises(UserError, match=r"3 steps in a row; lower the learning rate.+ are listed in .*nonfinite-rank0"):
        fit(task, tmp_path, 2.0**16, max_steps=50)
    assert (task.guard.searched, task.guard.skipped) == (16, 3)
    rows = [json.loads(line) for line in (tmp_path / "nonfinite-rank0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(19)), "from the first step of the search on"
    assert all(row["keys"] == [f"pairs/{number}" for number in range(12)] for row in rows)


def test_a_search_for_the_scale_is_counted_apart_and_does_not_stop_a_run(tmp_path):
    task = pairs.task(max_nonfinite=3)
    trainer, scale = fit(task, tmp_path, 2.0**40, max_steps=50)
    assert task.guard.searched > 3 and 1 < scale == 2.0 ** (40 - task.guard.searched), "its gradients did overflow"
    assert (task.guard.skipped, task.guard.in_a_row) == (0, 0)
    assert trainer.callback_metrics["train/scaler_skipped_steps"] == task.guard.searched
    assert "train/skipped_steps" not in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = pairs.Contrastive.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.guard.searched == task.guard.searched


def test_a_loss_that_is_no_number_is_not_taken_for_a_search(tmp_path):
    task = pairs.task(max_nonfinite=2)
    real = task._contrastive_loss
    task._contrastive_loss = lambda image, text: real(image, text) * float("nan")
    with pytest.raises(UserError, match="2 steps in a row"):
        fit(task, tmp_path, 2.0**16, max_steps=9)
