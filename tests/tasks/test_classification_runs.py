"""Whole runs of the classification task: teachers, rates, resuming, averages, the command line, checkpoints."""

import csv
import logging
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from dtpvit._run_folder import RunCheckpoint, StepSeed
from dtpvit.cli import main
from dtpvit.errors import UserError
from dtpvit.interop.image_models import load_classifier, pixel_statistics
from dtpvit.interop.loading import load_clip
from dtpvit.tasks.classification import Classification
from dtpvit.tasks.contrastive import Contrastive
from dtpvit.tasks.optimization import layer_groups
from dtpvit.tasks.weight_average import WeightAverage

sys.path.insert(0, str(Path(__file__).parent))
import labelled
import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


# A teacher


@pytest.mark.parametrize("tokens", ["cosine", "mse"])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn_and_comes_back_to_it(tokens, taught_by):
    """Without labels in the loss, a student pushed away from its teacher returns; as it is, both distances are 0."""
    options = {"model": labelled.config(reducers={}), "init": taught_by["init"], "learning_rate": 0.01}
    teacher = {**taught_by, "logits_weight": 1.0, "tokens": tokens, "temperature": 2.0}
    same = labelled.task(**options, teacher=teacher)
    figures = labelled.fit(same, max_steps=1, limit_val_batches=0)
    assert abs(figures["train/distill_logits"]) < 1e-6 and abs(figures["train/distill_tokens"]) < 1e-6
    history = []
    student = labelled.task(**{**options, "init": None}, teacher=teacher)
    with torch.no_grad():
        for (name, parameter), value in zip(student.model.named_parameters(), same.model.parameters(), strict=True):
            parameter.copy_(value if name.startswith("pos") else value + 0.02 * torch.randn_like(value))

    class Record(labelled.L.Callback):
        def on_train_batch_end(self, trainer, *unused):
            history.append([float(trainer.callback_metrics[f"train/distill_{kind}"]) for kind in ("logits", "tokens")])

    labelled.fit(student, max_epochs=12, limit_val_batches=0, callbacks=[Record()])
    first, last = torch.tensor(history[:3]).mean(0), torch.tensor(history[-3:]).mean(0)
    assert (first > 1e-3).all() and (last < 0.5 * first).all()


def test_a_pooled_student_learns_from_a_dense_teacher_and_keeps_no_part_of_it(taught_by):
    teacher = {**taught_by, "tokens": "cosine", "logits": "hard"}
    module = labelled.task(teacher=teacher, mode="frozen", mixing={"mixup": 0.5})
    figures = labelled.fit(module, callbacks=[WeightAverage()])
    assert figures["train/distill_tokens"] > 0 and figures["train/distill_logits"] > 0
    assert set(module.state_dict()) == set(module.model.state_dict())


def test_tokens_are_masked_in_training_and_removed_in_validation(taught_by):
    reducer = {"class_path": "DynamicViT", "init_args": {"stages": 2}, "each": {"keep": [0.5, 0.25]}}
    module = labelled.task(
        model=labelled.config(reducers={"1,2": reducer}),
        teacher={**taught_by, "tokens": "mse", "tokens_weight": 0.5},
        predictor_lr_scale=100.0,
        learning_rate=1e-5,
    )
    before = {name: value.clone() for name, value in module.model.named_parameters()}
    figures = labelled.fit(module)
    assert (figures["train/tokens"], figures["val/tokens"]) == (65, 17)
    assert figures["train/distill_tokens"] > 0 and figures["train/block1/ratio"] > 0 < figures["train/block2/ratio"]
    assert {name for name in before if "reducers" in name} <= labelled.changed(module, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 9}, r"does not know the 9 classes of this task \(shape \(7, 32\), here \(9, 32\)\)"),
        ({"model": labelled.config(image_size=48)}, "the teacher sees images of 32x32, the student of 48x48"),
        ({"teacher": {"logits": "sorft"}}, "'sorft'; expected one of none, soft, hard"),
        ({"teacher": {"tokens": "mse"}, "model": labelled.config(dim=16)}, "tokens have width and grid"),
        ({"teacher": {"heat": 2}}, "the options of teacher do not fit"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(options, message, taught_by):
    module = labelled.task(**{**options, "teacher": {**taught_by, **options.get("teacher", {})}})
    with pytest.raises(UserError, match=message):
        labelled.fit(module)


# Optimizer and schedules


def test_layers_learn_at_decaying_rates_like_timm_s_and_the_predictor_at_its_own():
    module, dense = labelled.task(), timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=32, num_heads=2)
    rates = {"learning_rate": 0.1, "weight_decay": 0.3, "layer_decay": 0.5}

    def by_name(model, groups):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    ours = by_name(module.model, layer_groups(module.model, **rates, predictor_lr_scale=10.0))
    theirs = param_groups_layer_decay(dense, 0.3, dense.no_weight_decay(), layer_decay=0.5)
    theirs = by_name(dense, [{**group, "lr": 0.1 * group["lr_scale"]} for group in theirs])
    predictor = {name for name in ours if name.startswith("reducers.")}
    assert {name: rate for name, rate in ours.items() if name not in predictor} == theirs
    assert predictor and {ours[name][0] for name in predictor} == {1.0}
    assert len(ours) == len(list(module.model.parameters()))
    assert ours["head.weight"] == (0.1, 0.3) and ours["blocks.0.attn.qkv.bias"][1] == 0.0
    assert ours["blocks.1.mlp.fc1.weight"][0] == pytest.approx(0.5 * ours["blocks.2.mlp.fc1.weight"][0])


class Rates(labelled.L.Callback):
    def __init__(self, name):
        self.name, self.seen = name, []

    def on_train_batch_end(self, trainer, module, *unused):
        self.seen.append((trainer.global_step - 1, getattr(module.model.reducers["1"], self.name)))


POOLING = {"class_path": "DynamicPooling", "init_args": {"compression": 4}}
SELECTION = {"class_path": "EViT", "init_args": {"keep": 0.5}}


@pytest.mark.parametrize(
    ("reducer", "name", "steps", "expected"),
    [
        (POOLING, "compression", (4, 0), [1, 1.75, 2.5, 3.25, 4, 4]),
        (SELECTION, "keep", (4, 0), [1, 0.926777, 0.75, 0.573223, 0.5, 0.5]),
        (SELECTION, "keep", (2, 2), [1, 1, 1, 0.75, 0.5, 0.5]),
        (POOLING, "compression", (0, 4), [1, 1, 1, 1, 4, 4]),
    ],
)
def test_rates_approach_their_target_also_after_a_resume(reducer, name, steps, expected, tmp_path):
    options = {"compression_warmup": steps[0], "compression_delay": steps[1]}
    options["model"] = labelled.config(reducers={1: reducer})
    first, second = Rates(name), Rates(name)
    with pytest.raises(labelled.Killed):
        labelled.fit(labelled.task(**options), callbacks=[first, labelled.Stop(tmp_path / "a.ckpt", 2)], max_epochs=2)
    labelled.fit(labelled.task(**options), ckpt_path=tmp_path / "a.ckpt", callbacks=[second], max_epochs=2)
    assert first.seen + second.seen == [(step, pytest.approx(rate)) for step, rate in enumerate(expected)]


# Resuming, averages


def everything(**more):
    """All that could forget something: noise, stochastic depth, mixing, warm-ups."""
    mixing = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5}
    model = labelled.config(drop_path=0.3)
    return labelled.task(model=model, mixing=mixing, compression_warmup=5, layer_decay=0.8, warmup_steps=3, **more)


@pytest.mark.parametrize("step", [2, 3])
def test_killed_and_resumed_equals_uninterrupted_with_a_weight_average(step, tmp_path):
    whole, resumed = everything(), everything()
    expected = labelled.fit(whole, max_epochs=2, callbacks=[StepSeed(0), WeightAverage(0.7)])
    with pytest.raises(labelled.Killed):
        stop = labelled.Stop(tmp_path / "a.ckpt", step)
        labelled.fit(everything(), max_epochs=2, callbacks=[StepSeed(0), WeightAverage(0.7), stop])
    again = [StepSeed(0), WeightAverage(0.7)]
    found = labelled.fit(resumed, max_epochs=2, callbacks=again, ckpt_path=tmp_path / "a.ckpt")
    labelled.check_same(labelled.weights(resumed), labelled.weights(whole))
    assert {name: found[name] for name in expected} == expected


def test_the_average_is_of_weights_alone_is_validated_and_its_last_checkpoint_goes_on(tmp_path):
    seen = []

    class Watch(labelled.L.Callback):
        def on_fit_start(self, trainer, module):
            seen.append(labelled.weights(module))

        def on_train_batch_end(self, trainer, module, *unused):
            seen.append(labelled.weights(module))

    keep = RunCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=100)
    module = labelled.task()
    options = {"enable_checkpointing": True, "max_epochs": 1}
    figures = labelled.fit(module, callbacks=[WeightAverage(0.75), Watch(), keep], **options)
    average = seen[0]
    for step in seen[1:]:
        average = {n: average[n].lerp(v, 0.25) if "calibration" not in n else v for n, v in step.items()}
    labelled.check_same(labelled.weights(module), average, rtol=1e-6, atol=1e-7)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    labelled.check_same(saved["state_dict"], labelled.weights(module))
    labelled.check_same(saved["current_model_state"], seen[-1])
    run = labelled.trainer(
        callbacks=[WeightAverage(0.75), keep], enable_checkpointing=True
    )  # as `dtpvit validate` has it, from the same YAML
    (validated,) = run.validate(
        labelled.task(), datamodule=labelled.Images(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert validated == pytest.approx({name: figures[name] for name in validated})


YAML = """
seed_everything: 0
trainer:
  max_epochs: 2
  accelerator: cpu
  gradient_clip_val: 1.0
  callbacks:
    - {class_path: dtpvit.tasks.weight_average.WeightAverage, init_args: {decay: 0.5}}
model:
  class_path: dtpvit.tasks.classification.Classification
  init_args:
    model: {image_size: 32, patch_size: 4, dim: 32, depth: 3, num_heads: 2,
      reducers: {1: {class_path: DynamicPooling, init_args: {compression: 4}}}}
    num_classes: 7
    mode: frozen
    mixing: {mixup: 0.8, mode: pair}
    teacher: {model: {image_size: 32, patch_size: 4, dim: 32, depth: 3, num_heads: 2}, init: INIT, tokens: mse}
data: {class_path: labelled.Images}
"""


def test_a_yaml_trains_measures_resumes_and_validates(tmp_path, monkeypatch, capsys, taught_by):
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "OMP_WAIT_POLICY", "TQDM_MININTERVAL"):  # the command sets them for its process
        monkeypatch.setenv(name, os.environ.get(name, "120"))
    Path("small.yaml").write_text(YAML.replace("INIT", taught_by["init"]))
    assert main(["fit", "--config", "small.yaml"]) == 0
    fitted = capsys.readouterr().err
    assert "kept fresh" not in fitted.split("teacher initialised")[0] and "train/loss" in fitted
    with open("runs/small/efficiency.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"] and 3 < float(rows[0]["compression"]) < 5
    assert main(["fit", "--config", "small.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    capsys.readouterr()
    assert main(["validate", "--config", "small.yaml", "--ckpt_path", "last"]) == 0
    printed = capsys.readouterr().out
    assert all(f"val/{name}" in printed for name in ("acc1", "acc5", "loss", "tokens_max", "gmacs"))
    wrong = ["fit", "--config", "small.yaml", "--model.init_args.mixing", "{mixupp: 1}"]
    assert main(wrong) == 2 and "mixupp" in capsys.readouterr().err


# Checkpoints and initial weights


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "dtp_vit_tiny_patch16_224_4x"])
def test_a_checkpoint_is_timm_s(name, tmp_path):
    module = Classification(model=name, num_classes=10)
    run = labelled.trainer()
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "last.ckpt")
    theirs = timm.create_model(name, num_classes=10, checkpoint_path=str(tmp_path / "last.ckpt")).eval()
    assert module.image_size == (224, 224) and set(theirs.state_dict()) == set(module.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(images), theirs(images), rtol=0, atol=1e-5)
    again = Classification.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    labelled.check_same(labelled.weights(again), labelled.weights(module))
    loaded = load_classifier(tmp_path / "last.ckpt")
    assert loaded.name == name and (loaded.mean, loaded.std) == ((0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), theirs(images), rtol=0, atol=1e-5)
    fresh = Classification(model=name, num_classes=3, init=str(tmp_path / "last.ckpt"))
    fresh.trainer = labelled.trainer()
    fresh.setup("fit")
    assert torch.equal(fresh.model.blocks[3].mlp.fc1.weight, module.model.blocks[3].mlp.fc1.weight)


def test_a_trained_classifier_is_loaded_as_it_was_and_nothing_else_is(tmp_path):
    module, keep = labelled.task(mean=(0.1, 0.2, 0.3)), RunCheckpoint(dirpath=tmp_path, save_last=True)
    labelled.fit(module, callbacks=[keep], enable_checkpointing=True)
    loaded = load_classifier(tmp_path / "last.ckpt")
    assert not loaded.model.training and loaded.name == "custom" and loaded.mean == (0.1, 0.2, 0.3)
    assert loaded.model.reducers["1"].boundary_calibration.boundary_threshold.isfinite()
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(pixels), module.eval()(pixels))
    with pytest.raises(UserError, match=r"last.ckpt is of a classifier; expected one of a dual encoder"):
        load_clip(checkpoint=tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other = {**content["hyper_parameters"], "num_classes": 3}
    torch.save({**content, "hyper_parameters": other}, tmp_path / "other.ckpt")
    torch.save({"state_dict": pairs.task().state_dict(), "hyper_parameters": {"model": "x"}}, tmp_path / "clip.ckpt")
    for file, message in {"other": r"head.weight \(7, 32\), here \(3, 32\)", "clip": "records no classifier"}.items():
        with pytest.raises(UserError, match=message):
            load_classifier(tmp_path / f"{file}.ckpt")


def test_a_run_starts_from_the_image_tower_of_a_contrastive_checkpoint(tmp_path, caplog):
    clip = pairs.task()
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.ckpt")
    module = labelled.task(init=str(tmp_path / "clip.ckpt"), mode="linear_probe")
    assert isinstance(clip, Contrastive)
    with caplog.at_level(logging.INFO, "dtpvit"):
        labelled.fit(module)
    trunk = clip.model.visual.trunk.state_dict()
    assert set(module.model.state_dict()) - set(trunk) == {"head.weight", "head.bias"}
    labelled.check_same({name: module.state_dict()[name] for name in trunk}, trunk)
    assert "kept fresh: visual.trunk.head.weight (the source has none that fits)" in caplog.text


@pytest.mark.parametrize(("classes", "kept"), [(labelled.CLASSES, True), (labelled.CLASSES + 1, False)])
def test_a_classifier_that_fits_is_kept(classes, kept, taught_by, caplog):
    module = labelled.task(init=taught_by["init"], num_classes=classes)
    module.trainer = labelled.trainer()
    with caplog.at_level(logging.INFO, "dtpvit"):
        module.setup("fit")
    assert (module.model.head.weight.std() > 0.3) == kept
    assert ("not taken: visual.trunk.head.weight (shape (7, 32), here (8, 32))" in caplog.text) != kept


def test_pixels_are_normalised_as_the_preset_was_trained():
    assert pixel_statistics({"preset": "vit_base_patch32_clip_224"})[0] == pytest.approx(
        (0.48145466, 0.4578275, 0.40821073)
    )
    assert pixel_statistics({"preset": "vit_small_patch32_clip_224"})[0][0] == pytest.approx(0.48145466)
    assert pixel_statistics({"preset": "deit_tiny_patch16_224"})[0] == (0.485, 0.456, 0.406)
    assert pixel_statistics({"preset": "vit_tiny_patch16_96"})[1] == (0.5, 0.5, 0.5)
    module = labelled.task(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    white = module.normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(white, torch.tensor([1.8, 3.2, 0.7]))
