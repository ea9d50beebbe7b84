"""Runs on bad data: they go on, say what was left out, and stop on all ranks together where it is too much."""

import logging
import re
import sys
from pathlib import Path

import labelled
import lightning as L
import pairs
import pytest

from dtpvit.datamodules.image_text import ImageTextShards
from dtpvit.datamodules.instruction import InstructionData
from dtpvit.datamodules.labelled_images import LabelledImages
from dtpvit.errors import UserError
from dtpvit.tasks.contrastive import Contrastive

sys.path.append(str(Path(__file__).parents[1] / "datamodules"))

import conversing
from conversation_files import llava, write_json
from shard_files import jpeg, write_tar

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero:UserWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning"),
]
HTML = b"<html>404</html>"
BAD_PAIRS = {"jpg": HTML, "txt": b"a cat"}, {"jpg": b"", "txt": b"a cat"}, {"jpg": jpeg(0), "txt": b" "}


def pair_data(folder, shards, **options):
    """One shard for each (number of samples, which of them are bad)."""
    for name, (count, bad) in enumerate(shards):
        samples = {f"{n:04d}": {"jpg": jpeg(n), "txt": b"a dog %d" % n} for n in range(count)}
        samples |= {f"{n:04d}": BAD_PAIRS[n % len(BAD_PAIRS)] for n in bad}
        write_tar(folder / f"{name}.tar", samples)
    return ImageTextShards(**({"train": str(folder), "batch_size": 20, "num_workers": 0} | options))


def image_data(folder, count, bad, **options):
    for n in range(count):
        target = folder / str(n % labelled.CLASSES) / f"{n}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(HTML if n in bad else jpeg(n))
    defaults = {"train": str(folder), "labels": "folders", "batch_size": 20, "num_workers": 0, "auto_augment": None}
    return LabelledImages(**(defaults | options))


def fit(task, data, folder=None, **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(**(defaults | options))
    trainer.fit(task, datamodule=data)
    return trainer


def test_a_contrastive_run_goes_on_and_says_what_it_left_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dtpvit"):
        trainer = fit(pairs.task(), pair_data(tmp_path, [(45, (0, 1, 2))], shuffle_buffer=0), max_epochs=2)
    assert trainer.global_step == 4
    assert caplog.text.count("skipped 1 no image, 1 no caption, 1 broken image") == 2
    assert "epoch 1: skipped" in caplog.text and "epoch 2: skipped" in caplog.text
    assert trainer.callback_metrics["data/skipped/broken_image"] == 1


def test_a_classification_run_goes_on_and_says_what_it_left_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dtpvit"):
        trainer = fit(labelled.task(), image_data(tmp_path, 40, (0, 1)), max_epochs=2)
    assert trainer.global_step == 4
    assert "epoch 1: skipped" in caplog.text and trainer.callback_metrics["data/skipped/broken_image"] >= 1


def judged(caplog):
    """What was said of validations."""
    return [(one.levelname, one.getMessage()) for one in caplog.records if "validation of" in one.getMessage()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_contrastive_validation_says_what_it_is_of(tmp_path, num_workers, caplog):
    data = pair_data(tmp_path / "train", [(40, ())])
    pair_data(tmp_path / "val", [(12, (0, 1, 2, 3)), (6, ())])
    cut = tmp_path / "val" / "1.tar"
    cut.write_bytes(b"<html>404</html>" * 100)
    for n in range(10):
        image = tmp_path / "zeroshot" / ("cat", "dog")[n % 2] / f"{n}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(HTML if n == 4 else jpeg(n))
    more = {"val": str(tmp_path / "val"), "zeroshot": str(tmp_path / "zeroshot"), "num_workers": num_workers}
    data = ImageTextShards(train=data.train, batch_size=20, val_batch_size=4, **more)
    with caplog.at_level(logging.INFO, "dtpvit"):
        found = fit(pairs.task(), data, max_epochs=2, num_sanity_val_steps=1).callback_metrics
    said = "validation of 8 pairs, 9 images for zero-shot; left out: 1 unreadable shard, 1 no image, 1 no caption, "
    ((level, line),) = judged(caplog)
    assert level == "WARNING" and line.startswith(f"{said}2 broken image, 1 unreadable or incomplete, such as ")
    assert (found["val/pairs"], found["val/zeroshot_images"], found["val/skipped"]) == (8, 9, 6)


def test_an_instruction_validation_says_what_it_is_of(tmp_path, caplog):
    words = conversing.language_model(tmp_path / "words")
    train = write_json(tmp_path / "train", [llava(n) for n in range(4)])
    val = write_json(tmp_path / "val", [llava(n, 2) for n in range(7)], broken=(1, 5))
    data = InstructionData(train=train, val=val, batch_size=4, num_workers=0)
    with caplog.at_level(logging.INFO, "dtpvit"):
        found = fit(conversing.task(words), data, default_root_dir=tmp_path).callback_metrics
    line = (
        f"validation of 5 conversations, 10 answers; left out: 2 unreadable or incomplete, such as record r1 of {val}"
    )
    assert judged(caplog) == [("WARNING", line)]
    assert (found["val/conversations"], found["val/answers"], found["val/skipped"]) == (5, 10, 2)


def test_a_classification_validation_says_what_it_is_of_again_when_that_changes(tmp_path, caplog):
    options = {"num_workers": 0, "labels": "folders", "auto_augment": None, "batch_size": 10}
    image_data(tmp_path, 20, ())
    data, task = LabelledImages(train=str(tmp_path), val=str(tmp_path), **options), labelled.task()
    with caplog.at_level(logging.INFO, "dtpvit"):
        found = fit(task, data, max_epochs=2).callback_metrics
        (tmp_path / "3" / "3.jpg").write_bytes(HTML)
        L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).validate(task, data, verbose=False)
    said = [("INFO", "validation of 20 images")]
    left_out = f"left out: 1 unreadable or incomplete, such as {tmp_path}/3/3.jpg"
    assert judged(caplog) == [*said, ("WARNING", f"validation of 19 images; {left_out}")]
    assert found["val/images"] == 20 and "val/skipped" not in found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_pairs_stop_the_run_in_a_sentence(tmp_path, num_workers):
    data = pair_data(tmp_path, [(400, range(0, 400, 4)), (400, range(0, 400, 4))], num_workers=num_workers)
    task = pairs.task()
    with pytest.raises(UserError) as error:
        fit(task, data, max_epochs=9)
    said = str(error.value)
    assert re.match(r"2\d% of the training samples are bad, judged by \d\d\d \(", said) and "\n" not in said
    assert all(f"{cause}: " in said for cause in ("broken image", "no caption", "no image"))
    assert re.search(r"/[01]/0\d\d\d \(broken image\)", said), "an example by its key"
    assert "max_skipped allows 10%" in said and "--data.init_args.max_skipped" in said
    assert task.global_step < 40, "and not at the end of all epochs"


def test_too_many_bad_files_stop_the_run_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"2\d% of .*broken image: \d+; such as .*\.jpg \(broken image\)"):
        fit(labelled.task(), image_data(tmp_path, 600, range(0, 600, 4)))


@pytest.mark.parametrize(("count", "options"), [(800, {"max_skipped": 0.3}), (800, {"max_skipped": 1}), (120, {})])
def test_what_is_allowed_and_what_is_small_goes_on(tmp_path, count, options):
    trainer = fit(pairs.task(), pair_data(tmp_path, [(count, range(0, count, 4))], **options))
    assert trainer.global_step == count // 20


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    for make in (ImageTextShards, LabelledImages, InstructionData):
        with pytest.raises(UserError, match=r"max_skipped is .* from 0 to 1"):
            make(max_skipped=share)


class Noting(Contrastive):
    """Writes how each rank was stopped."""

    folder = None

    def on_train_batch_end(self, *args):
        try:
            super().on_train_batch_end(*args)
        except UserError as error:
            (self.folder / f"rank{self.global_rank}.txt").write_text(f"step {self.global_step}: {error}")
            raise


@pytest.mark.slow
def test_all_ranks_stop_together_although_one_alone_has_bad_samples(tmp_path):
    """Two shards, one a rank: the second rank alone would have stopped, and left the first one waiting."""
    data = pair_data(tmp_path / "data", [(800, ()), (800, range(0, 800, 3))], shuffle_buffer=0)
    task = Noting(model=pairs.config(), warmup_steps=1)
    task.folder = tmp_path
    with pytest.raises(Exception, match=r"UserError: 20% of the training samples are bad"):
        fit(task, data, devices=2, strategy="ddp_spawn")
    ends = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert ends[0] == ends[1]
    assert re.search(r"/1/0\d\d\d \(broken image\)", ends[0]), "the first rank names the second one's samples"
