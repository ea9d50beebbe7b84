"""The page of ``dtpvit demo``: what is behind it on real files, and the served page through Gradio's own client."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpvit.cli import main
from dtpvit.datamodules.scenes import SEEN, draw_scene
from dtpvit.errors import UserError
from dtpvit.evaluation import demo_view
from dtpvit.evaluation.demo_view import DemoTower, read_photo
from dtpvit.evaluation.towers import load_tower, twin_tower, without_reducers

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
import labelled
import pairs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of a dual encoder, of one with a sigmoid loss, and of a classifier."""
    folder, found = tmp_path_factory.mktemp("demo"), {}
    siglip = pairs.task(model=pairs.config(init_logit_bias=-10.0, init_logit_scale=2.3))
    for name, task in (("pairs", pairs.task()), ("siglip", siglip), ("classes", labelled.task())):
        found[name] = folder / name / "checkpoints" / "last.ckpt"
        found[name].parent.mkdir(parents=True)
        content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
        torch.save(content | {"pytorch-lightning_version": "2"}, found[name])
    return found


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    draw_scene("demo", 160, SEEN).image.resize((200, 120)).save(path)
    return path


def test_a_look_counts_what_the_blocks_saw(checkpoints, photo):
    tower = load_tower(str(checkpoints["pairs"]))
    looker = DemoTower(tower, CPU, rounds=1)
    own, moved = (looker.view(read_photo(photo), rate) for rate in (None, 2.0))
    assert (own.cost.tokens, moved.cost.tokens, own.dense.tokens) == (16, 32, 64)  # nominal: never calibrated
    assert own.segments.caption == "16 tokens of 64 patches, 4.0x" and own.segments.drawing.pixels().shape == (
        32,
        32,
        3,
    )
    assert own.heat is not None and own.heat.scale == ("0", "1")
    assert own.cost.gmacs < moved.cost.gmacs < own.dense.gmacs == moved.dense.gmacs
    dense = without_reducers(tower)
    pixels = torch.zeros(1, 3, 32, 32)
    assert own.dense.gmacs == pytest.approx(dense.macs(dense.encode(pixels)[1].layouts) / 1e9)
    assert own.cost.milliseconds > 0 and own.speed_up > 0 and own.scores == {}
    assert tower.trunk.reducers["1"].compression == 4  # as it was


def test_a_twin_shares_weights_but_not_rates(checkpoints):
    tower = load_tower(str(checkpoints["pairs"]))
    twin = twin_tower(tower)
    assert twin.image is twin.whole.visual and twin.trunk is twin.image.trunk and twin.trunk is not tower.trunk
    ours = dict(tower.whole.named_parameters())
    assert all(weight is ours[name] for name, weight in twin.whole.named_parameters())
    twin.trunk.reducers["1"].boundary_calibration.boundary_threshold.fill_(7)
    assert tower.trunk.reducers["1"].boundary_calibration.boundary_threshold.isnan()
    assert not without_reducers(tower).trunk.reducers and tower.trunk.reducers


def test_labels_are_scored_as_the_model_scores_captions(checkpoints, photo):
    looker = DemoTower(load_tower(str(checkpoints["pairs"])), CPU, rounds=1)
    scores = looker.view(read_photo(photo), None, ["a cat", " ", "snow", "a cat "], "{c}").scores
    assert set(scores) == {"a cat", "snow"} and sum(scores.values()) == pytest.approx(1)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    model, tokenize = looker.tower.whole, looker.tower.tokenize
    pixels = looker._transform(read_photo(photo))[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (looker.tower.mean, looker.tower.std))
    with torch.no_grad():
        images, texts, scale = model((pixels - mean) / std, tokenize(["a cat", "snow"]))
        expected = (scale * images @ texts.T).softmax(-1)[0].tolist()
    assert [scores["a cat"], scores["snow"]] == pytest.approx(expected, abs=1e-5)


def test_a_sigmoid_model_scores_each_label_apart_and_a_classifier_none(checkpoints, photo):
    siglip = DemoTower(load_tower(str(checkpoints["siglip"])), CPU, rounds=1)
    both = siglip.view(read_photo(photo), None, ["a cat", "snow"]).scores
    assert siglip.view(read_photo(photo), None, ["snow"]).scores["snow"] == pytest.approx(both["snow"], rel=1e-3)
    assert sum(both.values()) < 0.1  # the bias is -10
    classes = DemoTower(load_tower(str(checkpoints["classes"])), CPU, rounds=1)
    assert not classes.has_text and classes.view(read_photo(photo), None, ["a cat"]).scores == {}


def test_prompts_and_labels_that_do_not_fit(checkpoints, photo):
    looker = DemoTower(load_tower(str(checkpoints["pairs"])), CPU, rounds=1)
    with pytest.raises(UserError, match="no place for the label"):
        looker.view(read_photo(photo), None, ["a cat"], "a photo")
    with pytest.raises(UserError, match="101 labels; give at most 100"):
        looker.view(read_photo(photo), None, [str(number) for number in range(101)])


def test_an_encoder_without_reducers_and_a_way_without_a_rate(photo, monkeypatch):
    monkeypatch.setattr(demo_view, "alternate", lambda run, *_, **__: {name: [1.0] for name in run})
    looker = DemoTower(load_tower("dtp_vit_tiny_patch16_224_1x"), CPU)
    seen = looker.view(read_photo(photo), 3)
    assert not seen.moved and seen.cost.tokens == seen.dense.tokens == 196 and seen.cost.gmacs == seen.dense.gmacs


def test_photos_are_upright_and_bad_ones_are_refused(tmp_path, monkeypatch):
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[274] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").size == (20, 40)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"no image that can be read; give a whole JPEG"):
        read_photo(tmp_path / "text.png")
    whole = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) - 100])
    with pytest.raises(UserError, match="no image that can be read"):
        read_photo(tmp_path / "half.jpg")
    Image.new("1", (30_000, 3_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="more than 89 million pixels"):
        read_photo(tmp_path / "bomb.png")
    monkeypatch.setattr(demo_view, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="MiB; give one of at most"):
        read_photo(tmp_path / "turned.jpg")


def test_real_photographs(shared_data):
    looker = DemoTower(load_tower("dtp_vit_tiny_patch16_224_4x"), CPU, rounds=1)
    for path in sorted((shared_data / "imagenet_sample").glob("*.jpg"))[:3]:
        seen = looker.view(read_photo(path), 6)
        assert seen.cost.tokens == 33 and len(np.unique(seen.segments.drawing.source)) == 33


MISTAKES = {
    "nothing to show": ([], "give --checkpoint FILE, or --model NAME --reducers FILE"),
    "missing": (["--checkpoint", "none.ckpt"], "none.ckpt"),
    "port": (["--checkpoint", "none.ckpt", "--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
    "host": (["--checkpoint", "none.ckpt", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
}


@pytest.mark.parametrize("options, sentence", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, sentence, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", sys)  # not needed before the mistakes are found
    assert main(["demo", "--port", str(free_port()), *options]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--checkpoint", "none.ckpt"]) == 2
    assert "pip install dtpvit[demo]" in capsys.readouterr().err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(checkpoints, tmp_path_factory):
    """Address of the page, served by the command in a process of its own, with two encoders."""
    for package in ("gradio", "gradio_client"):
        pytest.importorskip(package, reason=f"needs {package}: pip install dtpvit[demo]")
    port, log = free_port(), tmp_path_factory.mktemp("served") / "log"
    files = [str(checkpoints[name]) for name in ("pairs", "classes")]
    command = [sys.executable, "-m", "dtpvit", "demo", "--checkpoint", *files, "--port", str(port)]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        address = f"http://127.0.0.1:{port}/"
        try:
            wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()  # or the tests would wait for one that does not end


def wait_for(address, process, log):
    end = time.monotonic() + 500
    while time.monotonic() < end and process.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=30).close()
        except urllib.error.URLError:
            time.sleep(0.2)
    pytest.fail(f"the page is not served: {log.read_text()}")


@pytest.mark.slow
def test_the_page_needs_no_network(served):
    with urllib.request.urlopen(served, timeout=30) as answer:
        policy, html = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]*)"|<link[^>]*\shref="([^"]*)"', html)
    assert loaded and not [both for both in loaded if "//" in "".join(both).replace(served, "")]
    assert '"analytics_enabled": false' in html.lower() or '"analytics_enabled":false' in html.lower()


@pytest.mark.slow
def test_files_of_the_server_are_not_shown(served, photo):
    for path in (str(photo), "/dev/zero", "/etc/passwd"):
        asked = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "pairs, last", True, 4, "", ""]}
        request = urllib.request.Request(f"{served}gradio_api/call/look", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{served}gradio_api/call/look/{event}", timeout=30) as answer:
            said = answer.read().decode()
        assert said.startswith("event: error") and "was not uploaded by a user" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own packages
def test_the_page_end_to_end(served, photo, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(served, verbose=False, download_files=tmp_path)

    def look(path, own=True, compression=4, labels="", prompt="a {c}", encoder="pairs, last"):
        return client.predict(handle_file(path), encoder, own, compression, labels, prompt, api_name="/look")

    said, segments, heat, cost, scores = look(photo, labels="a cat, snow\na boat")
    assert said == "16 tokens of 64 patches, 4.0x, as it was trained"
    for picture in (segments, heat):
        with Image.open(picture["value"]) as found:
            assert found.size == (416, 416)
    assert "| tokens | 16 | 64 |" in cost and re.search(r"\| ms \| [\d.]+ \| [\d.]+ \|", cost)
    assert {entry["label"] for entry in scores["value"]["confidences"]} == {"a cat", "snow", "a boat"}
    assert look(photo, own=False, compression=2)[0].startswith("32 tokens of 64 patches, 2.0x, by the slider")
    assert look(photo, encoder="classes, last", labels="a cat")[4]["visible"] is False
    broken = photo.with_name("broken.jpg")
    broken.write_bytes(photo.read_bytes()[:300])
    said, segments, *_ = look(broken)
    assert said.startswith("**The file is no image that can be read") and segments["visible"] is False
