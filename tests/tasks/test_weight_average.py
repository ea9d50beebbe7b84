"""An average of what learns: what it keeps, how precisely, and where it begins."""

import sys
from pathlib import Path

import pytest
import torch

from dtpvit._run_folder import StepSeed
from dtpvit.errors import UserError
from dtpvit.tasks.weight_average import WeightAverage

sys.path.insert(0, str(Path(__file__).parent))
import labelled

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


class Kept(WeightAverage):
    """Says what it kept when the training ends."""

    def on_fit_end(self, trainer, pl_module):
        self.kept = dict(self._average)
        super().on_fit_end(trainer, pl_module)


def test_only_what_learns_is_kept(tmp_path):
    callback, module = Kept(0.5), labelled.task(mode="adapt", init=labelled.trained(tmp_path))
    labelled.fit(module, callbacks=[callback])
    assert set(callback.kept) == {n for n, p in module.named_parameters() if p.requires_grad}
    assert all("reducers" in name for name in callback.kept)


def test_small_steps_add_up_though_the_weights_are_of_bfloat16(tmp_path):
    """With a decay near 1 an average in bfloat16 would stay where it began."""
    callback, stop = Kept(0.9999), labelled.Stop(tmp_path / "half.ckpt", 2)
    start = dict(labelled.task().named_parameters())
    options = {"precision": "bf16-true", "max_epochs": 2}
    labelled.fit(labelled.task(), callbacks=[StepSeed(0), callback], **options)
    head = "model.head.weight"
    assert callback.kept[head].dtype == torch.float32
    moved = (callback.kept[head] - start[head].bfloat16().float()).abs().max()
    assert 0 < moved < 1e-3
    with pytest.raises(labelled.Killed):
        labelled.fit(labelled.task(), callbacks=[StepSeed(0), Kept(0.9999), stop], **options)
    again = Kept(0.9999)
    labelled.fit(labelled.task(), callbacks=[StepSeed(0), again], ckpt_path=tmp_path / "half.ckpt", **options)
    labelled.check_same(again.kept, callback.kept)


def test_begins_from_the_weights_of_a_checkpoint_without_an_average(tmp_path):
    run = labelled.trainer()
    run.fit(labelled.task(), datamodule=labelled.Images())
    run.save_checkpoint(tmp_path / "last.ckpt")
    before, callback = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], Kept(0.5)
    labelled.fit(labelled.task(), callbacks=[callback], ckpt_path=tmp_path / "last.ckpt")
    for name, value in callback.kept.items():
        torch.testing.assert_close(value, before[name.removeprefix("model.")], rtol=0, atol=0)


def test_a_decay_of_one_is_refused():
    with pytest.raises(UserError, match="decay of the weight average is 1; expected at least 0 and less than 1"):
        WeightAverage(decay=1)
