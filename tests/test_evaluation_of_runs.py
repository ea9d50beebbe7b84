"""``dtpvit validate`` on a classifier that ``dtpvit fit`` trained, as somebody meets it who has just done that."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dtpvit.cli import main
from dtpvit.tasks.contrastive import Contrastive

VISION = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "num_heads": 2}
REDUCER = {"class_path": "DynamicPooling", "init_args": {"compression": 4}}
CLASSES = ("ant", "bee", "cat", "dog", "emu", "fox")
CONFIG = {
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    "model": {
        "class_path": "dtpvit.tasks.classification.Classification",
        "init_args": {"model": {**VISION, "reducers": {1: REDUCER}}, "num_classes": len(CLASSES), "warmup_steps": 1},
    },
    "data": {
        "class_path": "dtpvit.datamodules.labelled_images.LabelledImages",
        "init_args": {"train": "train", "val": "val", "batch_size": 4, "num_workers": 0, "get_data": "see README"},
    },
}


def class_folders(root: Path, classes: tuple[str, ...] = CLASSES) -> None:
    for number in range(2 * len(classes)):
        file = root / classes[number // 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run called small was trained, with checkpoints and data that do not belong to it beside it."""
    root = tmp_path_factory.mktemp("project")
    class_folders(root / "train")
    class_folders(root / "val")
    class_folders(root / "fewer", CLASSES[:4])
    (root / "empty").mkdir()
    (root / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    before = Path.cwd()
    os.chdir(root)
    try:
        assert main(["fit", "--config", "small.yaml"]) == 0
    finally:
        os.chdir(before)
    whole = (root / LAST).read_bytes()
    content = torch.load(root / LAST, weights_only=True)
    (root / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (root / "text.ckpt").write_text("hello")
    torch.save(content["state_dict"], root / "bare.pth")
    other = {**content["hyper_parameters"], "num_classes": 3}
    torch.save({**content, "hyper_parameters": other}, root / "three.ckpt")
    wider = {**content["state_dict"], "pos_embed": torch.zeros(1, 5, 32)}
    torch.save({**content, "state_dict": wider}, root / "smaller_images.ckpt")
    clip = Contrastive({"embed_dim": 8, "vision": VISION, "text": {"width": 32, "heads": 2, "layers": 1}})
    torch.save({**content, "state_dict": clip.state_dict(), "hyper_parameters": dict(clip.hparams)}, root / "clip.ckpt")
    return root


LAST = "runs/small/checkpoints/last.ckpt"


@pytest.fixture
def project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    for name in ("COLUMNS", "OMP_WAIT_POLICY", "TQDM_MININTERVAL"):  # the command sets them for its process
        monkeypatch.setenv(name, os.environ.get(name, "120"))
    return folder


def figures(said: str) -> dict[str, float]:
    """The table, as numbers."""
    return {name: float(value) for name, value in re.findall(r"((?:val|test)/\w+)\s+│\s+([\d.e-]+)", said)}


def test_a_checkpoint_alone_is_enough_and_gives_what_the_config_gives(project, capsys):
    assert main(["validate", "--config", "small.yaml", "--ckpt_path", "last"]) == 0
    said = capsys.readouterr()
    found = figures(said.out)
    names = ("acc1", "acc5", "loss", "tokens", "tokens_min", "tokens_max", "gmacs", "images")
    assert set(found) == {f"val/{name}" for name in names}
    first, second = said.err.splitlines()
    assert f"validate of small from {LAST}" in first
    assert second == f"dtpvit: validation of {found['val/images']:.0f} images"
    assert main(["validate", "--ckpt_path", LAST]) == 0
    assert figures(capsys.readouterr().out) == found
    assert main(["test", "--ckpt_path", LAST, "--data", "val"]) == 0
    assert figures(capsys.readouterr().out) == {name.replace("val", "test"): value for name, value in found.items()}


def test_a_checkpoint_alone_continues_its_run(project, capsys):
    assert main(["fit", "--ckpt_path", LAST, "--trainer.max_epochs", "1"]) == 0
    assert f"fit -> runs/small from {LAST}" in capsys.readouterr().err
    assert torch.load(LAST, weights_only=True)["global_step"] == 3 and not Path("runs/small/earlier").exists()


def test_initial_weights_are_evaluated_without_training_and_their_absence_is_said(project, capsys):
    assert main(["validate", "--ckpt_path", LAST]) == 0
    expected = figures(capsys.readouterr().out)
    assert main(["validate", "--config", "small.yaml", "--init", LAST]) == 0
    said = capsys.readouterr()
    assert figures(said.out) == expected
    assert f"no --ckpt_path was given: the model starts from {LAST}" in said.err and "tensors taken" in said.err
    assert main(["validate", "--config", "small.yaml"]) == 0
    assert "no --ckpt_path was given: the model has random weights" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_counted(project, capsys):
    class_folders(project / "damaged")
    (project / "damaged/bee/2.png").write_bytes(b"no image")
    assert main(["validate", "--ckpt_path", LAST, "--data", "damaged"]) == 0
    assert "; left out: 1 unreadable or incomplete, such as damaged/bee/2.png" in capsys.readouterr().err


MISTAKES = {
    "no such file": (["--ckpt_path", "nowhere.ckpt"], "'nowhere.ckpt', which does not exist"),
    "a folder": (["--ckpt_path", "runs"], "checkpoint runs is a folder"),
    "cut off": (["--ckpt_path", "cut.ckpt"], "cut.ckpt is damaged or no checkpoint"),
    "text": (["--ckpt_path", "text.ckpt"], "text.ckpt is damaged or no checkpoint"),
    "weights alone": (
        ["--ckpt_path", "bare.pth"],
        "no checkpoint of `dtpvit fit`; to start from the weights in it, give",
    ),
    "another class count": (["--ckpt_path", "three.ckpt"], "three.ckpt has 3 classes, the config's model has 6; give"),
    "another task": (["--ckpt_path", "clip.ckpt"], "clip.ckpt is of a dual encoder, the config is of a classifier"),
    "other shapes": (
        ["--ckpt_path", "smaller_images.ckpt"],
        "1 have another shape (first: pos_embed (1, 5, 32), here (1, 17, 32)); give the config",
    ),
    "fewer classes": (
        ["--ckpt_path", "last", "--data", "fewer"],
        "fewer has 4 classes (ant to dog) where the model's head has 6",
    ),
    "an empty folder": (["--ckpt_path", "last", "--data", "empty"], "empty holds no class folders"),
    "no data": (["--ckpt_path", "last", "--data", "gone"], "gone is no folder on this machine"),
    "the folder of both splits": (["--ckpt_path", "last", "--data", "."], "give one split, such as train"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, project, capsys):
    arguments, sentence = MISTAKES[mistake]
    assert main(["validate", "--config", "small.yaml", *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("dtpvit 0")]
    assert len(said) == 1 and sentence in said[0], said
