"""``dtpvit cost``: what it counts, what it measures, what it says when it cannot."""

import json
import re

import pytest
import torch
from PIL import Image
from torch import nn

from dtpvit.cli import main
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.evaluation.comparison import measure_cost
from dtpvit.evaluation.measuring import Quartiles, alternate, memory_of_step, speed_ups
from dtpvit.evaluation.towers import dense_counterpart, load_tower

CPU = torch.device("cpu")
TINY = "dtp_vit_tiny_patch16_224_4x"


def test_the_table_and_the_file(tmp_path, capsys):
    file = tmp_path / "cost.json"
    options = ["--batch-size", "2", "--rounds", "1", "--json", str(file)]
    assert main(["cost", TINY, "vit_tiny_patch16_224", *options]) == 0
    said = capsys.readouterr().out
    for line in ("GMACs an image", "predictor or matching", "tokens from block 2", "FLOP ratio", "efficiency"):
        assert re.search(rf"^ *{line}", said, flags=re.MULTILINE), line
    record = json.loads(file.read_text())
    assert record["reference"] == "vit_tiny_patch16_224" and torch.__version__.startswith(record["versions"]["torch"])
    dense, pooled = record["models"]
    assert (dense["name"], pooled["name"]) == ("vit_tiny_patch16_224", TINY)
    assert dense["gmacs"] == pytest.approx(1.25349, abs=1e-5)  # without classifier, like ours
    assert sum(pooled["gmacs_by_part"].values()) == pytest.approx(pooled["gmacs"])
    assert pooled["tokens"]["2"] == {"mean": 50.0, "std": 0.0, "min": 50, "max": 50}
    for kind in ("forward", "training"):
        assert pooled["timings"][kind]["efficiency"] < pooled["timings"][kind]["speed_up"]
        assert dense["timings"][kind]["speed_up"] == dense["timings"][kind]["efficiency"] == 1.0
    assert 0 < pooled["timings"]["training"]["kept_bytes"] < dense["timings"]["training"]["kept_bytes"]
    assert pooled["timings"]["training"]["kept_bytes"] <= pooled["timings"]["training"]["peak_bytes"]


def test_real_images(tmp_path, capsys):
    """Images of unlike content get unlike numbers of tokens, around the nominal one."""
    for i in range(12):
        pixels = torch.randint(0, 256, (80, 90, 3), dtype=torch.uint8) if i % 2 else torch.full((80, 90, 3), 20 * i)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    file = tmp_path / "cost.json"
    arguments = ["cost", TINY, "--images", str(tmp_path), "--batch-size", "12", "--steps", "none", "--json", str(file)]
    assert main(arguments) == 0
    tokens = json.loads(file.read_text())["models"][1]["tokens"]["2"]
    assert tokens["min"] < 50 < tokens["max"] and tokens["mean"] == pytest.approx(50, abs=2)
    assert main([*arguments[:4], "--batch-size", "14"]) == 2
    assert "has 12 images that can be read; 14 are wanted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nix"], "there is no model, config or checkpoint 'nix'"),
        (["nix.yaml"], "there is no config nix.yaml"),
        (["nix.ckpt"], "nix.ckpt does not exist"),
        (["vit_tiny_patch16_224"], "name a --reference"),
        (["resnet18.nope"], "timm cannot make 'resnet18.nope'"),
        ([TINY, "--images", "text.txt"], "holds neither images nor tar shards"),
        ([TINY, "--images", "."], "holds neither images nor tar shards"),
        ([TINY, "--device", "meta"], "'meta' cannot be used"),
        (["odd.yaml"], "the model is 5"),
        ([TINY, "--images", "nowhere"], "nowhere"),
        ([TINY, "--batch-size", "0"], "batch_size is 0"),
        ([TINY, "--device", "abacus"], "'abacus' cannot be used"),
        ([TINY, "--json", "no/such/folder.json"], "no/such/folder.json"),
        ([], "the following arguments are required"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "odd.yaml").write_text("model: {init_args: {model: 5}}")
    assert main(["cost", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_the_dense_counterpart_is_the_published_model():
    assert dense_counterpart(load_tower(TINY)).name == "vit_tiny_patch16_224"
    small = load_tower("configs/quickstart.yaml")
    twin = dense_counterpart(small)
    assert small.trunk.reducers and not twin.trunk.reducers
    images = torch.randn(2, 3, *small.image_size)
    ours = small.encode(images)[1].layouts
    dense = twin.encode(images)[1].layouts
    assert small.macs(ours) < twin.macs(dense)


def test_a_training_step_costs_thrice_without_the_gradient_of_pixels():
    tower, dense = load_tower("dtp_vit_tiny_patch16_224_1x"), load_tower("vit_tiny_patch16_224")
    layouts = tower.encode(torch.randn(1, 3, 224, 224))[1].layouts
    ours, theirs = tower.macs(layouts, training=True), dense.macs((), training=True)
    # The norm's and the class token's gradients are no products.
    assert ours == pytest.approx(theirs, rel=1e-3) and ours < 3 * tower.macs(layouts)


@pytest.mark.slow
def test_published_models_count_what_they_cost():
    """open_clip's towers, counted by torch with fused attention off, against the sums of METHODS."""
    for name, gmacs, text in (("ViT-B-32", 4.409, 2.980), ("ViT-B-16", 17.563, 2.980)):
        tower = load_tower(name)
        (found,) = measure_cost([tower], {name: torch.zeros(1, 3, 224, 224)}, CPU, steps="none")
        assert found.gmacs == pytest.approx(gmacs, abs=1e-3) and found.text_gmacs == pytest.approx(text, abs=1e-3)
        ours = load_tower(f"DTP-{name}-1x")
        (mine,) = measure_cost([ours], {ours.name: torch.zeros(1, 3, 224, 224)}, CPU, steps="none")
        assert mine.gmacs == pytest.approx(found.gmacs, rel=1e-6)
        assert mine.text_gmacs == pytest.approx(found.text_gmacs, rel=1e-6)
        assert mine.parameters == found.parameters


def test_calibration_of_a_trained_predictor_stays():
    tower = load_tower(TINY)
    reducer = next(m for m in tower.trunk.modules() if isinstance(m, DynamicPooling))
    reducer.boundary_calibration.boundary_threshold.fill_(-torch.inf)  # every place starts a segment
    (found,) = measure_cost([tower], {TINY: torch.randn(2, 3, 224, 224)}, CPU, steps="none", calibrate=True)
    assert found.tokens[2].min == 197


def test_memory_is_what_autograd_keeps():
    layer = nn.Linear(256, 512, bias=False)
    x = torch.randn(1024, 256, requires_grad=True)
    layer(x).sum().backward()
    found = memory_of_step(lambda: layer(x).relu().sum(), CPU, backward=True)
    output = 1024 * 512 * 4
    assert output <= found.kept <= 1.1 * output  # relu keeps its result; the product needs only what was there
    assert found.peak >= 2 * output
    with torch.no_grad():
        assert memory_of_step(lambda: layer(x).relu().sum(), CPU, backward=False).kept == 0


def test_candidates_run_in_turn():
    order = []
    seconds = alternate({name: lambda name=name: order.append(name) for name in "abc"}, CPU, rounds=3, warmup=1)
    assert len(order) == 12 and all(len(times) == 3 for times in seconds.values())
    rounds = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert set(rounds) == {"abc", "cba"} and rounds[0] != rounds[1]


def test_speed_ups_are_of_one_round():
    """A machine that is slow for a round changes no ratio."""
    found = speed_ups({"dense": [4.0, 40.0, 4.0], "ours": [1.0, 10.0, 1.0]}, "dense")
    assert found["ours"] == Quartiles(4.0, 4.0, 4.0) and found["dense"].median == 1.0
