"""A learning rate that is too high is told, one that is not is left alone."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from dtpvit.errors import UserError
from dtpvit.tasks.loss_watch import LossWatch, Window, rise

sys.path.insert(0, str(Path(__file__).parent))
import labelled

# Means over 20 steps of configs/quickstart.yaml (warm-up of 100) at 1, 10 and 30 times its learning rate.
QUICKSTART = {
    1: [4.24, 3.91, 2.84, 2.23, 1.95, 1.83, 1.79, 1.76, 1.68, 1.69],
    10: [3.98, 2.52, 2.32, 2.30, 2.26, 2.49, 2.32, 2.40, 2.26, 2.30],
    30: [3.70, 2.68, 2.92, 3.15, 3.31, 3.18, 3.17, 3.00, 3.20, 3.19],
}


@pytest.mark.parametrize(("factor", "lowest"), [(1, None), (10, 100), (30, 40)])
def test_the_quickstart_is_told_where_it_is_too_fast(factor, lowest):
    windows = [Window(mean, 0.025, 20 * number + 20, 5e-4) for number, mean in enumerate(QUICKSTART[factor])]
    found = rise(windows, 100)
    assert (found and found[0].step) == lowest


def test_a_loss_that_stands_still_has_not_risen():
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert rise([Window(0.3 + 0.02 * x, 0.02, 20 * number + 20, 1.0) for number, x in enumerate(noise)], 200) is None


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
@pytest.mark.parametrize(("factor", "tells"), [(1, False), (10, True)])
def test_a_small_classifier_is_told_when_and_only_when_it_learns_too_fast(factor, tells, caplog, tmp_path):
    watch, task = LossWatch(), labelled.task(learning_rate=3e-3 * factor, warmup_steps=60)
    stop = labelled.Stop(tmp_path / "a.ckpt", 121)
    with caplog.at_level(logging.WARNING, "dtpvit"), pytest.raises(labelled.Killed):
        labelled.fit(task, max_epochs=84, limit_val_batches=0, callbacks=[watch, stop])
    assert bool(watch.said) == tells and ("the learning rate is too high: the loss fell to" in caplog.text) == tells
    again = LossWatch()
    again.on_load_checkpoint(None, task, torch.load(tmp_path / "a.ckpt", weights_only=True))
    assert (again.windows, again.said) == (watch.windows, watch.said) and len(watch.windows) == 6


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_it_ends_the_training_where_it_is_asked_to():
    task = labelled.task(learning_rate=3e-2, warmup_steps=60)
    with pytest.raises(UserError, match="the learning rate is too high: the loss fell to") as ended:
        labelled.fit(task, max_epochs=84, limit_val_batches=0, callbacks=[LossWatch(stop=True)])
    assert " at step 120, " in str(ended.value)
