"""The main job on generated images, as a user runs it: fit, go on, evaluate, export, load in open_clip."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from dtpvit.datamodules.shapes import ShapesParameters, generate_shapes
from dtpvit.interop.loading import load_clip
from dtpvit.tasks.contrastive import Contrastive

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
VALIDATE = ["--trainer.check_val_every_n_epoch", "3"]
SMALL = """--data.init_args.num_train 96 --data.init_args.num_val 24 --data.init_args.num_test 1
--data.init_args.batch_size 16 --data.init_args.num_workers 1 --trainer.accelerator cpu
--data.init_args.root shapes""".split()


def run(folder, *arguments, fails=False):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dtpvit", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=500, check=False
    )
    assert (done.returncode == 0) != fails, done.stderr
    return done


@pytest.mark.slow
def test_fit_resume_zeroshot_export_open_clip(tmp_path):
    run(tmp_path, "fit", "--config", str(CONFIG), *SMALL, "--trainer.max_epochs", "1")
    last = tmp_path / "runs/quickstart/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6
    run(tmp_path, "fit", "--config", str(CONFIG), *SMALL, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == 12
    data = ["--data", "shapes/heldout", "--templates", "shapes/heldout/templates.txt"]
    run(tmp_path, "zeroshot", "--checkpoint", str(last), *data, "--output", "zeroshot.json")
    result = json.loads((tmp_path / "zeroshot.json").read_text())
    assert 0 <= result["metrics"]["acc1"] <= result["metrics"]["acc5"] <= 1 and result["n"] == 11
    assert result["gmacs_per_image"] < result["gmacs_dense"] and result["task"] == "zeroshot_classification"
    run(tmp_path, "export", "--checkpoint", str(last), "--out", "exported")
    again = run(tmp_path, "zeroshot", "--model", "local-dir:exported", *data, "--output", "exported.json")
    assert json.loads((tmp_path / "exported.json").read_text())["metrics"] == result["metrics"], again.stdout
    ours = load_clip(checkpoint=last).model
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}").eval()
    images = torch.rand(3, 3, *ours.visual.trunk.image_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(images), ours.encode_image(images), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_wrong_paths_are_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "broken.ckpt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["fit", "--config", "absent.yaml"],
        ["fit", "--config", str(CONFIG), "--init", "absent.pth"],
        ["fit", "--config", str(CONFIG), "--ckpt_path", "absent.ckpt"],
        ["fit", "--config", str(CONFIG), "--model.init_args.model", "DTP-ViT-B-32-3x"],
        ["zeroshot", "--data", "absent", "--model", "DTP-ViT-B-32-10x"],
        ["zeroshot", "--data", "empty", "--model", "DTP-ViT-B-32-10x"],
        ["zeroshot", "--data", "empty", "--checkpoint", "broken.ckpt"],
        ["export", "--checkpoint", "broken.ckpt", "--out", "x"],
        ["fti"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "dtpvit", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=500,
            check=False,
        )
        said = [line for line in done.stderr.strip().splitlines() if line.startswith("dtpvit: ")]
        assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, (arguments, done.stderr)


@pytest.mark.slow
def test_the_rate_that_was_trained_is_the_rate_at_evaluation(tmp_path):
    """The quickstart on fewer images: on images never seen, a quarter of the patches starts a segment."""
    fewer = "--data.init_args.num_train 4000 --data.init_args.num_val 500 --data.init_args.num_test 2".split()
    arguments = [*fewer, "--data.init_args.root", "shapes", "--trainer.accelerator", "cpu"]
    run(tmp_path, "fit", "--config", str(CONFIG), *arguments, "--trainer.max_epochs", "3", *VALIDATE)
    with open(tmp_path / "runs/quickstart/metrics.csv", newline="") as file:
        rates = [row["val/boundary_rate"] for row in csv.DictReader(file) if row.get("val/boundary_rate")]
    assert abs(float(rates[-1]) - 0.25) < 0.02


@pytest.mark.slow
def test_a_published_config_trains_resumes_and_loads_in_open_clip(tmp_path):
    """configs/cc12m_10x.yaml with other data: the checkpoint, calibrated by training, is open_clip's as it is."""
    generate_shapes(tmp_path / "shapes", ShapesParameters(num_train=32, num_val=8, num_test=1), processes=1)
    config = str(CONFIG.parent / "cc12m_10x.yaml")
    data = ["--data", str(tmp_path / "shapes" / "train"), "--data.init_args.batch_size", "8"]
    arguments = ["fit", "--config", config, *data, "--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu"]
    run(tmp_path, *arguments, "--trainer.max_steps", "2")
    run(tmp_path, *arguments, "--trainer.max_steps", "3", "--ckpt_path", "last")
    last = tmp_path / "runs/cc12m_10x/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    task = Contrastive.load_from_checkpoint(last, weights_only=True).eval()
    assert not task.model.visual.trunk.reducers["2"].boundary_calibration.boundary_threshold.isnan()
    theirs = open_clip.create_model("DTP-ViT-B-32-10x", pretrained=str(last)).eval()
    images, text = torch.randn(4, 3, 224, 224), task.tokenize(["a red circle", "two stars", "", "a cross"])
    with torch.no_grad():
        for ours, other in zip(task(images, text), theirs(images, text), strict=True):
            torch.testing.assert_close(other, ours, rtol=0, atol=1e-5)
