"""``dtpvit cost``: what it counts, what it measures, what it says when it cannot."""

import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from dtpvit.cli import main
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.evaluation.comparison import measure_cost
from dtpvit.evaluation.cost import image_cost
from dtpvit.evaluation.measuring import Quartiles, alternate, memory_of_step, speed_ups
from dtpvit.evaluation.towers import dense_counterpart, load_tower
from dtpvit.tasks.classification import Classification

CONFIGS = Path(__file__).parents[2] / "configs"
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
        (["odd_classifier.yaml"], "the model is 5; expected a name like vit_tiny_patch16_224"),
        (["bare.pth"], "bare.pth does not record which model it is; give one of `dtpvit fit`, or the model's name"),
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
    (tmp_path / "odd_classifier.yaml").write_text("model: {init_args: {model: 5, num_classes: 3}}")
    torch.save({"state_dict": {"head.weight": torch.zeros(2, 2)}}, tmp_path / "bare.pth")
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


@pytest.mark.parametrize("name", ["flowers224", "cifar10", "imagenet_deit_tiny_4x", "imagenet_b32_finetune_10x"])
def test_a_classifier_is_measured_with_its_head(name):
    """Against what its dense twin costs by torch's counter, which is the same code for timm's models."""
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    tower = load_tower(str(CONFIGS / f"{name}.yaml"))
    dense = dense_counterpart(tower)
    images, _ = tower.pixels(None, 2)
    with torch.no_grad():
        features, encoding = tower.encode(images)
        same_shape, _ = dense.encode(images)
    assert features.shape == same_shape.shape == (2, options["num_classes"])
    assert list(tower.mean) == options.get("mean", pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4))
    assert tower.macs(encoding.layouts) < dense.macs(dense.encode(images)[1].layouts if dense.trunk else ())
    dim, classes = tower.trunk.dim, options["num_classes"]
    cost = image_cost(tower.trunk, encoding.layouts, tower.embed_dim)
    assert cost.projection.tolist() == [dim * classes] * 2


def test_the_checkpoint_of_a_classifier_stands_beside_its_dense_twin(tmp_path, capsys):
    vision = {"image_size": 32, "patch_size": 4, "dim": 32, "depth": 3, "num_heads": 2}
    reducer = {"class_path": "DynamicPooling", "init_args": {"compression": 4}}
    task = Classification(model={**vision, "reducers": {1: reducer}}, num_classes=7, std=(0.1, 0.2, 0.3))
    run = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    run.strategy.connect(task)
    run.save_checkpoint(tmp_path / "last.ckpt")
    tower = load_tower(str(tmp_path / "last.ckpt"))
    assert tower.std == (0.1, 0.2, 0.3) and tower.image_size == (32, 32) and tower.embed_dim == 7
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tower.encode(images)[0], task.eval()(images))
    file = tmp_path / "cost.json"
    arguments = ["cost", str(tmp_path / "last.ckpt"), "--batch-size", "4", "--rounds", "1"]
    assert main([*arguments, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "without reducers" in said and "give --images" not in said
    dense, pooled = json.loads(file.read_text())["models"]
    assert dense["gmacs"] > pooled["gmacs"] and pooled["tokens"]["1"]["mean"] == 17
    assert dense["gmacs_by_part"]["projection"] == pooled["gmacs_by_part"]["projection"] == 32 * 7 / 1e9
    task.model.reducers["1"].boundary_calibration.boundary_threshold.fill_(0.1)  # as training does
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert main([*arguments, "--steps", "none"]) == 0
    assert "keeps other numbers of tokens of photographs" in " ".join(capsys.readouterr().out.split())


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


@pytest.mark.parametrize("name", ["flowers224", "cc12m_10x"])
def test_a_config_counts_with_the_reducers_it_was_given(name, tmp_path):
    """What `fit --reducers FILE` leaves in the run's config.yaml."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config["model"]["init_args"]["vision"] = {
        "reducers": {"3": {"class_path": "FixedStride", "init_args": {"compression": 2}}}
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    tower = load_tower(str(tmp_path / "config.yaml"))
    assert {block: type(reducer).__name__ for block, reducer in tower.trunk.reducers.items()} == {"3": "FixedStride"}
