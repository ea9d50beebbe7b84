"""Pictures during training: which images, how often, into which folder and loggers, and on which rank."""

import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader

from dtpvit.errors import UserError
from dtpvit.evaluation.segment_pictures import draw_histogram
from dtpvit.tasks.segment_monitor import SegmentMonitor

sys.path.insert(0, str(Path(__file__).parent))
import conversing
import labelled

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


class Labelled(L.LightningDataModule):
    def train_dataloader(self):
        return self._loader(8)

    def val_dataloader(self):
        return self._loader(10)

    def _loader(self, count):
        image, label = labelled.images(count)
        batches = [{"image": image[at : at + 4], "label": label[at : at + 4]} for at in range(0, count, 4)]
        return DataLoader(batches, batch_size=None)


def fit(monitor, folder, task=None, data=None, **options):
    options = {"max_epochs": 4, "logger": False, "num_sanity_val_steps": 1} | options
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[monitor],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(task or labelled.task(), data or Labelled())
    return trainer


def test_every_second_epoch_the_same_images(tmp_path):
    monitor = SegmentMonitor(every_n_epochs=2, images=3, counted=7)
    fit(monitor, tmp_path)
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == ["epoch001.png", "epoch003.png"]
    kept = torch.stack(monitor._pixels)
    assert torch.equal(kept, labelled.images(10)[0][[0, 1, 2, 4, 5, 6, 8]])  # of batches of 4, 4 and 2
    first, second = (np.asarray(Image.open(tmp_path / "pictures" / f"epoch00{n}.png")) for n in (1, 3))
    assert first.shape == second.shape
    photo = slice(24, 24 + 400)
    assert (first[:, photo] == second[:, photo])[: 3 * 400].all() and (first != second).any()


def test_training_does_not_notice(tmp_path):
    """Weights, batches and random numbers are those of a run without pictures."""
    ends = []
    for monitor in (SegmentMonitor(), L.Callback()):
        task = labelled.task(model=labelled.config(drop_path=0.3))
        torch.manual_seed(1)
        fit(monitor, tmp_path, task, max_epochs=2)
        assert task.training
        ends.append(task.state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0, equal_nan=True)


def test_loggers(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="board", version=""), CSVLogger(tmp_path, name="table", version="")]
    fit(SegmentMonitor(images=2), tmp_path, logger=loggers, max_epochs=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    steps = [event.step for event in events.Images("segments/images")]
    assert len(steps) == 2 and steps == sorted(set(steps))
    tokens, probability = (
        events.Histograms(f"segments/{name}")[0].histogram_value for name in ("tokens", "probability")
    )
    assert tokens.num == 10 and probability.num == 10 * 64 and 0 < probability.min < probability.max <= 1
    rate = events.Scalars("segments/boundary_rate")[0].value
    assert rate == pytest.approx(tokens.sum / (10 * 64))
    assert "segments/boundary_rate" in (tmp_path / "table" / "metrics.csv").read_text()


def test_weights_and_biases_gets_pictures_and_histograms(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(save_dir=tmp_path)
    fit(SegmentMonitor(images=2), tmp_path, logger=logger, max_epochs=2)
    found = dict(logger.experiment.summary)
    logger.experiment.finish()
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/segments/*.png"))
    drawn = sorted(tmp_path.glob("pictures/*.png"))
    assert len(drawn) == 2
    for kept, own in zip(sorted(pictures, key=lambda path: int(path.stem.split("_")[1])), drawn, strict=True):
        with Image.open(kept) as one, Image.open(own) as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))
    assert 0 < found["segments/boundary_rate"] < 1
    assert all(name in found for name in ("segments/tokens", "segments/probability"))


def test_a_visual_language_model(tmp_path):
    folder = conversing.language_model(tmp_path / "language_model")
    fit(SegmentMonitor(), tmp_path, conversing.task(folder), conversing.Conversations(), max_epochs=1)
    assert (tmp_path / "pictures" / "epoch000.png").is_file()


def test_nothing_without_a_heat_map_breaks(tmp_path):
    """Dense: every patch is a token of its own."""
    fit(SegmentMonitor(images=1), tmp_path, labelled.task(model=labelled.config(reducers={})), max_epochs=1)
    with Image.open(tmp_path / "pictures" / "epoch000.png") as picture:
        assert picture.size[0] < 1000  # two columns


def test_only_rank_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    fit(SegmentMonitor(), tmp_path, max_epochs=1)
    assert not (tmp_path / "pictures").exists()


def test_a_trial_run_writes_nothing(tmp_path):
    fit(SegmentMonitor(), tmp_path, fast_dev_run=True, logger=CSVLogger(tmp_path))
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("wrong", [{"every_n_epochs": 0}, {"images": 0}, {"counted": -1}])
def test_numbers_below_one(wrong):
    with pytest.raises(UserError, match="at least 1"):
        SegmentMonitor(**wrong)


def test_histogram_bars():
    """One bar a whole number, as high as it occurs often."""
    drawn = draw_histogram(np.array([3, 3, 3, 3, 5, 5]), (100, 90)).photo
    blue = (drawn != 255).any(-1)
    assert blue[:, :30].sum(0).tolist() == [95] * 30
    assert blue[:, 30:60].sum(0).tolist() == [1] * 30 and blue[-1].all()
    assert blue[:, 60:].sum(0) == pytest.approx(48, abs=1)
