"""Every YAML builds; the small ones take a step."""

import importlib
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
import yaml
from PIL import Image

from dtpvit.cli import main
from dtpvit.datamodules.shapes import ShapesParameters, generate_shapes
from dtpvit.interop.tiny_language_model import make_tiny_language_model
from dtpvit.tasks.contrastive import Contrastive

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def built(part):
    """What a class path and its arguments stand for."""
    module, name = part["class_path"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**part["init_args"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "generated"
    generate_shapes(root, ShapesParameters(num_train=64, num_val=16, num_test=1, shard_size=16), processes=1)
    return root


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A language model and a trained encoder, small, in place of those that a config of instruction tuning names."""
    folder = tmp_path_factory.mktemp("stand_ins")
    make_tiny_language_model(["a"], folder / "language_model", dim=16, depth=1, num_heads=2)
    vision = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2}
    task = Contrastive({"embed_dim": 8, "vision": vision, "text": {"width": 16, "heads": 2, "layers": 1}})
    state = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save(state, folder / "encoder.ckpt")
    return {"language_model": str(folder / "language_model"), "init": str(folder / "encoder.ckpt")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path, monkeypatch, stand_ins):
    config = yaml.safe_load(path.read_text())
    if "language_model" in config["model"]["init_args"]:
        config["model"]["init_args"] |= stand_ins
    task = built(config["model"])
    built(config["data"])
    callbacks = [built(part) for part in config["trainer"].pop("callbacks", [])]
    L.Trainer(**config["trainer"], callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False)
    trunk = task.trunk
    rate = next((getattr(r, "compression", None) for r in trunk.reducers.values()), 1)
    for size in ("dense", "2x", "4x", "10x"):
        if path.stem.endswith(f"_{size}"):
            assert rate == (1 if size == "dense" else int(size[:-1]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_header_is_a_lab_notebook(path):
    header = path.read_text().split("\nseed_everything")[0]
    assert f"dtpvit fit --config configs/{path.name}" in header and "Data:" in header
    assert "xpected" in header or "Measured" in header


@pytest.mark.parametrize("name", ["quickstart", "flickr8k_small"])
def test_the_small_ones_take_a_step(name, drawn, tmp_path, monkeypatch):
    config = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", str(config), "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    arguments += ["--data.init_args.batch_size", "8", "--data.init_args.num_workers", "0"]
    if name == "quickstart":
        arguments += ["--data.init_args.root", str(tmp_path / "shapes"), "--data.init_args.num_train", "32"]
        arguments += ["--data.init_args.num_val", "8", "--data.init_args.num_test", "1"]
    else:
        arguments += ["--data", str(drawn / "train")]
    assert main(arguments) == 0


@pytest.mark.parametrize("name", ["flowers224", "cifar10"])
def test_the_small_classifiers_start_from_weights_at_224_pixels_and_take_a_step(name, tmp_path, monkeypatch, capsys):
    config = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    classes = yaml.safe_load(config.read_text())["model"]["init_args"]["num_classes"]
    for number in range(4 * classes):
        file = tmp_path / f"images/class{number % classes}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (5 * number, 0, 0)).save(file)
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), "deit_tiny.pth")
    arguments = ["fit", "--config", str(config), "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    arguments += ["--data.init_args.batch_size", "4", "--data.init_args.val_batch_size", "4"]
    arguments += ["--data.init_args.num_workers", "0", "--init", "deit_tiny.pth"]
    assert main([*arguments, "--data", "images", "--data.init_args.val", "images"]) == 0
    said = capsys.readouterr().err
    assert "150 tensors taken" in said and "not taken: visual.trunk.head.weight" in said


@pytest.mark.parametrize("name", ["cc12m_10x", "laion400m_10x", "flickr8k_small"])
def test_missing_data_is_said_in_one_sentence(name, tmp_path, monkeypatch, capsys):
    config = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    model = [
        "--model.init_args.model",
        '{"embed_dim": 8, "vision": {"preset": "vit_tiny_patch32_224"}, "text": {"width": 32}}',
    ]
    assert main(["fit", "--config", str(config), "--trainer.accelerator", "cpu", *model]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    folder = name.split("_")[0]
    assert f"data/{folder}/README.md" in said and said.startswith("dtpvit: ")
    assert folder == "flickr8k" or f"run dtpvit data get {folder}" in said
