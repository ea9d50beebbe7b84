"""``dtpvit tune`` as a user runs it: what it prints, what it writes, how it fails."""

import csv
import io
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dtpvit.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*litlogger.*")

VISION = {
    **{"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "num_heads": 2},
    "reducers": {1: {"class_path": "DynamicPooling", "init_args": {"compression": 2}}},
}
CLASSIFY = {
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    "model": {
        "class_path": "dtpvit.tasks.classification.Classification",
        "init_args": {"model": VISION, "num_classes": 2, "layer_decay": 0.8, "learning_rate": 1e-3},
    },
    "data": {
        "class_path": "dtpvit.datamodules.labelled_images.LabelledImages",
        "init_args": {"train": "images", "val": "images", "batch_size": 8, "num_workers": 0, "auto_augment": None},
    },
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config and 2 classes of 8 images, told apart by their colour."""
    for name, colour in (("ant", (200, 30, 30)), ("bee", (30, 30, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            stream = io.BytesIO()
            Image.new("RGB", (16, 16), tuple(value + number for value in colour)).save(stream, "PNG")
            (tmp_path / "images" / name / f"{number}.png").write_bytes(stream.getvalue())
    (tmp_path / "ants.yaml").write_text(yaml.safe_dump(CLASSIFY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("COLUMNS", "OMP_WAIT_POLICY", "TQDM_MININTERVAL"):  # the command sets them for its process
        monkeypatch.setenv(name, os.environ.get(name, "30"))
        monkeypatch.delenv(name)
    return tmp_path


def tune(*more: str) -> int:
    return main(["tune", "--config", "ants.yaml", *more])


def table(path: str) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_learning_rate_is_found_and_can_be_used(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--min-lr", "1e-5", "--num-training", "60") == 0
    said = capsys.readouterr()
    assert sorted(path.name for path in Path("runs/ants").rglob("*")) == [
        "learning_rate.csv",
        "learning_rate.png",
        "tune",
    ]
    rows = table("runs/ants/tune/learning_rate.csv")
    assert len(rows) <= 60 and rows[0]["learning_rate"] == 1e-5
    option, value = said.out.split("Suggested: ")[1].split(",")[0].split()
    assert 1e-5 < float(value) < 0.5 and "runs/ants/tune/learning_rate.csv and learning_rate.png" in said.out
    assert main(["fit", "--config", "ants.yaml", "--trainer.max_steps", "1", option, value]) == 0
    written = torch.load("runs/ants/checkpoints/last.ckpt", weights_only=True)
    assert written["hyper_parameters"]["learning_rate"] == float(value)
    assert main(["tune", "--config", "runs/ants/config.yaml", "--name", "again", "--num-training", "20"]) == 0
    assert Path("runs/ants/tune/learning_rate.csv").exists() and Path("runs/again/tune/learning_rate.csv").exists()


def test_a_batch_size_is_found_then_a_rate_at_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-batch-size", "8", "--steps-per-trial", "2", "--num-training", "20"]
    assert tune("--find", "both", *options) == 0
    said = capsys.readouterr()
    sizes = [row["batch_size"] for row in table("runs/ants/tune/batch_size.csv")]
    assert sizes in ([2, 4, 8], [2, 4])
    lines = [line for line in said.out.splitlines() if line.startswith("batch size ")]
    assert len(lines) == len(sizes) and all("images/s, peak memory" in line for line in lines)
    assert (
        "Suggested: --data.init_args.batch_size " in said.out and "A learning rate belongs to a batch size" in said.out
    )
    assert "No larger size was tried: " in said.out and "The other pairs" not in said.out
    assert Path("runs/ants/tune/learning_rate.csv").exists()


def test_a_contrastive_task_is_told_what_its_batch_size_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision": {**VISION, "image_size": 32}, "text": text}
    shapes = {"root": "shapes", "num_train": 16, "num_val": 4, "num_test": 1, "batch_size": 4, "num_workers": 0}
    config = {
        "trainer": {"accelerator": "cpu"},
        "model": {"class_path": "dtpvit.tasks.contrastive.Contrastive", "init_args": {"model": model}},
        "data": {"class_path": "dtpvit.datamodules.shapes.ShapesDataModule", "init_args": shapes},
    }
    Path("ants.yaml").write_text(yaml.safe_dump(config))
    options = ["--max-batch-size", "4", "--steps-per-trial", "1", "--num-training", "20"]
    assert tune("--find", "both", *options) == 0
    assert "The other pairs of a batch are what this loss learns from" in capsys.readouterr().out
    assert len(table("runs/ants/tune/learning_rate.csv")) == 20


def test_a_curve_without_a_slope_is_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--max-lr", "2e-7", "--num-training", "20") == 0
    said = capsys.readouterr().out
    assert said.startswith("No suggestion: between 1.0e-07 and 2.0e-07 the loss falls by no more")
    assert "--num_training" in said and Path("runs/ants/tune/learning_rate.png").exists()


def test_without_matplotlib_the_table_is_written(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert tune("--num-training", "20") == 0
    assert "pip install dtpvit[plot]" in capsys.readouterr().out
    assert [path.name for path in Path("runs/ants/tune").iterdir()] == ["learning_rate.csv"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--find", "rate"], "Expected a typing.Literal['lr', 'batch_size', 'both']. Got value: rate"),
        (["--find", "both", "--num-training", "19"], "num_training is 19; a curve needs at least 20 steps."),
        (["--find", "batch_size", "--max-batch-size", "1"], "max_batch_size is 1"),
        (["--data", "nowhere"], "nowhere"),
        (["--ckpt_path", "ants.yaml"], "ckpt_path is 'ants.yaml'; give weights with --init."),
        (["--model.init_args.mode", "watch"], "watch"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], expected: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(*arguments) == 2
    said = capsys.readouterr()
    assert expected in said.err and "Traceback" not in said.err and not said.out
    assert said.err.splitlines()[-1].startswith("dtpvit: ") and not Path("runs/ants/tune").exists()
