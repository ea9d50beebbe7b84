"""Visual instruction tuning as a user runs it: both stages, going on in mid-epoch, answering, one folder for all."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

import dtpvit
from dtpvit.interop.assistant import Question
from dtpvit.interop.tiny_language_model import make_tiny_language_model

pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
POOLING = {"class_path": "DynamicPooling", "init_args": {"compression": 4}}
ENCODER = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "num_heads": 2, "reducers": {1: POOLING}}


def run(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dtpvit", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def folder(tmp_path):
    """24 images of one colour, two questions about each, a language model, and the config of both stages."""
    (tmp_path / "images").mkdir()
    records, questions, answers = [], [], []
    for number in range(24):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (40, 32), COLOURS[name]).save(tmp_path / f"images/{number}.png")
        said = [("<image>\nwhat colour is it?", name), ("is it red?", "yes" if name == "red" else "no")]
        turns = [
            {"from": who, "value": text} for pair in said for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
        questions.append({"question_id": number, "image": f"{number}.png", "text": "what colour is it?"})
        answers.append({"question_id": number, "answer": name})
    (tmp_path / "train.json").write_text(json.dumps(records))
    for name, rows in (("questions", questions), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["what colour is it?", "is it red?", "yes", "no", *COLOURS]
    make_tiny_language_model(texts, tmp_path / "language_model", dim=32, depth=2, num_heads=2, max_length=256)
    config = {
        "seed_everything": 0,
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "gradient_clip_val": 1.0},
        "model": {
            "class_path": "dtpvit.tasks.instruction.Instruction",
            "init_args": {"language_model": "language_model", "encoder": ENCODER, "max_length": 128, "position": True},
        },
        "data": {
            "class_path": "dtpvit.datamodules.instruction.InstructionData",
            "init_args": {"train": "train.json", "images": "images", "batch_size": 4, "num_workers": 1},
        },
    }
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


FIT = ("fit", "--config", "tuning.yaml")
STAGE_2 = (
    *("--init", "stage1/checkpoints/last.ckpt", "--model.init_args.tune_language_model", "full"),
    *(
        "--model.init_args.tune_vision",
        "full",
        "--model.init_args.learning_rate",
        "0.005",
        "--trainer.max_epochs",
        "50",
    ),
    *("--data.init_args.independent_turns", "true", "--data.init_args.shuffle_turns", "true"),
)


def root(folder):
    return ("--trainer.default_root_dir", folder)


def test_two_stages_answers_and_one_folder(folder):
    run(folder, *FIT, *root("stage1"), "--model.init_args.template", "plain", "--model.init_args.learning_rate", "1e-2")
    first = torch.load(folder / "stage1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("language_model.") for name in first)
    run(folder, *FIT, *STAGE_2, *root("stage2"))
    last = "stage2/checkpoints/last.ckpt"
    asked = ("--questions", "questions.jsonl", "--images", "images", "--answers", "answers.jsonl", "--metric", "exact")
    run(folder, "vqa", "--checkpoint", last, *asked, "--out", "said.jsonl", "--json", "score.json")
    figures = json.loads((folder / "score.json").read_text())
    assert figures["score"]["accuracy"] == 1.0, figures
    run(folder, "vqa", "--checkpoint", last, *asked, "--out", "blind.jsonl", "--blind", "true", "--json", "blind.json")
    assert json.loads((folder / "blind.json").read_text())["score"]["accuracy"] == pytest.approx(1 / 3)
    done = run(folder, "ask", "--checkpoint", last, "--image", "images/0.png", "what colour is it?")
    assert done.stdout.strip() == "red" and "visual tokens" in done.stderr
    run(folder, "export", "--checkpoint", last, "--out", "exported")
    assistant = dtpvit.load_assistant(folder / "exported")
    blue = Image.open(folder / "images/2.png")
    assert assistant.answer([Question.of("what colour is it?", blue)])[0].text == "blue"


def test_a_killed_run_ends_as_one_that_was_not(folder):
    options = (*FIT, *STAGE_2[2:], "--trainer.max_epochs", "3", "--checkpoint.every_n_train_steps", "1")
    options += ("--model.init_args.tune_language_model", "lora", "--model.init_args.lora", '{"r": 4}')
    run(folder, *options, *root("whole"))
    command = [sys.executable, "-m", "dtpvit", *options, *root("killed")]
    last = folder / "killed/checkpoints/last.ckpt"
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 500
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if torch.load(last, weights_only=True)["global_step"] >= 8:  # in the second epoch of six steps
                break
        except Exception:  # not there yet, or half written
            time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it must not have come to its end by itself
    run(folder, *options, *root("killed"), "--ckpt_path", "last")
    whole, resumed = (
        torch.load(folder / f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    assert whole["global_step"] == resumed["global_step"] == 18
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0, equal_nan=True)
