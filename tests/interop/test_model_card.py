"""README.md and LICENSE of exported folders: what stands there is true, parses, and runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import dtpvit
from dtpvit.cli import main
from dtpvit.evaluation.towers import load_tower
from dtpvit.interop.checkpoint_facts import checkpoint_facts
from dtpvit.interop.model_card import MARK

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
import conversing
import pairs

REPOSITORY = Path(__file__).parents[2]


def save(task, path, **more):
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save(content | {"pytorch-lightning_version": "2"} | more, path)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint as Lightning leaves it after two epochs, and the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    more = {
        "epoch": 1,
        "global_step": 84,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 2, "processed": 2, "completed": 1}}}},
        "callbacks": {"RunCheckpoint{}": {"monitor": "val/acc1", "current_score": torch.tensor(0.625)}},
        "ImageTextShards": {"train_data": "/home/somebody/data/cc12m/{00000..00009}.tar", "batch_size": 64},
    }
    save(pairs.task(init=None), tmp_path / "last.ckpt", **more)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.jpg")
    return tmp_path / "last.ckpt"


def read(card):
    """Front matter as values, and the text below."""
    _, front, text = card.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def run_blocks(text):
    """Each Python block of a card, as somebody would paste it, in a process of its own; what they print."""
    said = []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    return said


def test_the_card_of_a_dual_encoder(checkpoint, capsys):
    assert main(["export", "--checkpoint", "last.ckpt", "--out", "exported"]) == 0
    front, text = read(Path("exported/README.md"))
    assert front["license"] == "apache-2.0" and front["library_name"] == "open_clip"
    assert front["pipeline_tag"] == "zero-shot-image-classification" and "dtpvit" in front["tags"]
    tower = load_tower("exported")
    macs = [float(found) for found in re.search(r"\| GMACs \| (\S+) \| (\S+) \|", text).groups()]
    encoded = tower.encode(torch.zeros(1, 3, 32, 32))[1]
    assert macs[0] == pytest.approx(tower.macs(encoded.layouts) / 1e9, rel=0.01) and macs[0] < macs[1]
    assert "| patch tokens behind the last reducer | 16 | 64 |" in text and "these are nominal" in text
    assert "cc12m/{00000..00009}.tar" in text and "somebody" not in text
    assert "| whole epochs | 2 |" in text and "| optimizer steps | 84 |" in text and "| val/acc1 | 0.625 |" in text
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["vision"]["dim"] == 32
    assert Path("exported/LICENSE").read_text() == (REPOSITORY / "LICENSE").read_text()


@pytest.mark.slow
def test_the_code_of_a_dual_encoders_card_runs(checkpoint):
    pytest.importorskip("onnxruntime", reason="needs dtpvit[onnx]")
    options = ["--out", "exported", "--onnx", "exported/tower.onnx", "--budget", "fixed"]
    assert main(["export", "--checkpoint", "last.ckpt", *options]) == 0
    scores, shape = run_blocks(read(Path("exported/README.md"))[1])
    assert set(eval(scores, {})) == {"a photo of a cat", "a photo of a dog"}
    assert sum(eval(scores, {}).values()) == pytest.approx(1) and shape == "(1, 16)\n"


@pytest.mark.slow
def test_the_card_of_an_assistant_and_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(conversing.task(conversing.language_model(tmp_path / "words"), init="/data/clip.pt"), tmp_path / "last.ckpt")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.jpg")
    assert main(["export", "--checkpoint", "last.ckpt", "--out", "assistant"]) == 0
    front, text = read(Path("assistant/README.md"))
    assert front["license"] == "other" and front["pipeline_tag"] == "image-text-to-text"
    assert "weights started from `data/clip.pt`, whose origin and licence are not recorded: unknown, check" in text
    assert re.search(r"language model started from `\S+/words`", text) and "holds no measurement" in text
    (said,) = run_blocks(text)
    assert re.search(r"\d+$", said.strip())
    assert Path("assistant/LICENSE").is_file()


@pytest.mark.slow
def test_the_code_of_the_page_on_inference_runs(tmp_path, monkeypatch):
    """The same folder and file names as on the page, a smaller encoder."""
    pytest.importorskip("onnxruntime", reason="needs dtpvit[onnx]")
    monkeypatch.chdir(tmp_path)
    config = pairs.config()
    config["vision"] |= {"image_size": 224, "patch_size": 32}
    save(pairs.task(model=config), tmp_path / "last.ckpt")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.jpg")
    options = ["--out", "exported", "--onnx", "exported/tower.onnx", "--budget", "fixed"]
    assert main(["export", "--checkpoint", "last.ckpt", *options]) == 0
    features, onnx, compiled = run_blocks((REPOSITORY / "docs/inference.md").read_text())
    assert (features, onnx) == ("torch.Size([1, 16])\n", "(1, 16)\n") and compiled == "torch.Size([1, 192])\n"


def test_a_card_made_ones_own_is_left_alone(checkpoint, capsys):
    arguments = ["export", "--checkpoint", "last.ckpt", "--out", "exported"]
    assert main(arguments) == 0
    card = Path("exported/README.md")
    written = card.read_text()
    card.write_text(written + "more")
    assert main(arguments) == 0 and card.read_text() == written
    card.write_text(own := written.replace(MARK, "My words."))
    assert main(arguments) == 0 and card.read_text() == own
    assert "left exported/README.md as it is" in capsys.readouterr().out


def test_bare_weights_tell_nothing():
    facts = checkpoint_facts({"state_dict": {"weight": torch.zeros(1)}})
    assert facts.model is facts.data is facts.epochs is facts.steps is None
    assert facts.recipe == facts.started_from == facts.metrics == {}


def test_citation_fits_the_package():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert cited["version"] == dtpvit.__version__ and cited["license"] == "Apache-2.0"
    assert "license = Apache-2.0" in (REPOSITORY / "setup.cfg").read_text() and cited["title"] == "dtpvit"
