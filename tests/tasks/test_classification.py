"""The classification task: what learns in each mode, caching, validation, mixing, two processes, refusals."""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from dtpvit.datamodules.labelled_images import LabelledImages
from dtpvit.encoder import VisionEncoder
from dtpvit.errors import UserError
from dtpvit.evaluation.cost import image_macs
from dtpvit.tasks.mixing import Mixing
from dtpvit.tasks.weight_average import WeightAverage

sys.path.insert(0, str(Path(__file__).parent))
import labelled

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


# Modes


@pytest.mark.parametrize("mode", ["adapt", "linear_probe", "frozen", "finetune"])
def test_each_mode_changes_its_own_parameters_and_no_bit_of_others(mode, tmp_path):
    model, init = labelled.config(drop_path=0.5), labelled.trained(tmp_path)
    module = labelled.task(mode=mode, model=model, weight_decay=0.5, init=init)
    before = labelled.weights(module)
    labelled.fit(module, callbacks=[WeightAverage(0.5)])
    names = {name for name, _ in module.model.named_parameters()}
    expected = {
        "adapt": {n for n in names if n.startswith("reducers.")},
        "linear_probe": {"head.weight", "head.bias"},
        "frozen": {n for n in names if n.startswith(("head.", "reducers."))},
        "finetune": names,
    }
    assert labelled.changed(module, before) == expected[mode]
    calibrated = "reducers.1.boundary_calibration.boundary_threshold"
    assert module.state_dict()[calibrated].isnan() == (mode == "linear_probe")
    if mode in ("adapt", "frozen"):
        module.train()
        learning = {name for name, part in module.model.named_modules() if part.training}
        assert "reducers.1" in learning and ("head" in learning) == (mode == "frozen")
        assert not any(name.startswith(("blocks", "norm")) for name in learning)


def test_linear_probing_is_the_same_with_and_without_the_cache(monkeypatch):
    encoded = []
    encode = VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, x, **o: encoded.append(len(x)) or encode(self, x, **o))
    results, spent = [], []
    for cache in (False, True):
        encoded.clear()
        module = labelled.task(mode="linear_probe", cache_features=cache, learning_rate=0.05)
        figures = labelled.fit(module, max_epochs=4)
        results.append((labelled.weights(module), figures))
        spent.append(sum(encoded))
    (plain, plain_figures), (cached, cached_figures) = results
    assert spent == [4 * (24 + 13), 24 + 13]
    labelled.check_same(cached, plain, rtol=1e-5, atol=1e-6)
    assert cached_figures == pytest.approx(plain_figures, rel=1e-5)
    assert plain_figures["train/loss"] < 0.9 * math.log(labelled.CLASSES)  # what was compared has learned something


def test_the_cache_refuses_augmented_images_and_says_where_it_saves_nothing(caplog):
    module = labelled.task(mode="linear_probe", cache_features=True)
    with pytest.raises(UserError, match="stay the same in every epoch"):
        labelled.fit(module, labelled.Images(augment=True, says_so=True), max_epochs=2)
    labelled.fit(module, labelled.Images(augment=True, says_so=False), max_epochs=2)
    assert "met only images that it had not seen before" in caplog.text


def test_adapting_keeps_the_answers_of_a_trained_classifier_only():
    with pytest.raises(UserError, match="give init with one"):
        labelled.fit(labelled.task(mode="adapt"))


def image_files(root, count, salt):
    """The generated images as class folders."""
    for number, (pixels, label) in enumerate(zip(*labelled.images(count, salt), strict=True)):
        file = root / f"class{label}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    return str(root)


def test_linear_probing_on_files_is_the_same_with_and_without_the_cache(tmp_path, monkeypatch):
    options = {"train": image_files(tmp_path / "train", 40, 0), "val": image_files(tmp_path / "val", 30, 1)}
    options |= {"batch_size": 8, "num_workers": 0}
    encoded = []
    encode = VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, x, **o: encoded.append(len(x)) or encode(self, x, **o))
    results, spent = [], []
    for cache in (False, True):
        encoded.clear()
        module = labelled.task(mode="linear_probe", cache_features=cache, learning_rate=0.05)
        figures = labelled.fit(module, LabelledImages(**options, augment=False), max_epochs=3)
        results.append((labelled.weights(module), figures))
        spent.append(sum(encoded))
    (plain, plain_figures), (cached, cached_figures) = results
    assert spent == [3 * (40 + 30), 40 + 30]
    labelled.check_same(cached, plain, rtol=1e-5, atol=1e-6)
    assert cached_figures == pytest.approx(plain_figures, rel=1e-5)
    with pytest.raises(UserError, match="augment false"):
        labelled.fit(labelled.task(mode="linear_probe", cache_features=True), LabelledImages(**options))


# Validation


def test_validation_counts_hits_loss_tokens_and_macs():
    module, run = labelled.task().eval(), labelled.trainer()
    with torch.no_grad():
        module.model.reducers["1"].boundary_calibration.boundary_threshold.fill_(0.1)  # counts now vary
    (found,) = run.validate(module, datamodule=labelled.Images(), verbose=False)
    pixels, label = labelled.images(13, salt=1)
    with torch.no_grad():
        encoding = module.model.encode(module.normalise(pixels))
        logits = module.model.head(encoding.pooled)
    lengths = encoding.tokens.lengths.float()
    ranks = (logits > logits.gather(1, label[:, None])).sum(1)
    expected = {
        "acc1": (ranks < 1).float().mean(),
        "acc5": (ranks < 5).float().mean(),
        "loss": cross_entropy(logits, label),
        "tokens": lengths.mean(),
        "tokens_min": lengths.min(),
        "tokens_max": lengths.max(),
        "gmacs": image_macs(module.model, encoding, labelled.CLASSES).mean() / 1e9,
        "images": 13,
    }
    assert found == pytest.approx({f"val/{name}": float(value) for name, value in expected.items()}, rel=1e-5)
    assert lengths.min() < lengths.max()
    (tested,) = run.test(module, datamodule=labelled.Images(), verbose=False)
    assert tested == {name.replace("val", "test"): value for name, value in found.items()}
    predicted = run.predict(module, datamodule=labelled.Images())
    joined = {name: torch.cat([part[name] for part in predicted]) for name in predicted[0]}
    torch.testing.assert_close(joined["logits"], logits)
    torch.testing.assert_close(joined["probabilities"], logits.softmax(1))
    assert torch.equal(joined["tokens"], encoding.tokens.lengths)


# Mixing and losses


def test_mixing_is_a_function_of_its_seed_and_leaves_the_generators_alone():
    pixels, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    mix = Mixing(labelled.CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.9)
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    results = []
    for seed in (5, 5, 6):
        python_state = random.getstate()
        results.append(mix(pixels.clone(), labels, seed))
        assert random.getstate() == python_state
        random.seed(len(results))
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    for first, again, other in zip(*results, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)
    target = results[0][1]
    assert target.shape == (6, labelled.CLASSES) and (target.sum(1) - 1).abs().max() < 1e-6
    hot = one_hot(labels, labelled.CLASSES) * 0.9 + 0.1 / labelled.CLASSES
    share = (target[0] - hot[5])[0] / (hot[0] - hot[5])[0]  # of the image itself, the rest from its partner
    torch.testing.assert_close(target, share * hot + (1 - share) * hot.flip(0))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("count", [1, 5])
def test_of_an_odd_batch_the_first_image_stays_and_the_others_are_mixed_in_pairs(mode, count):
    pixels, labels = torch.randn(count, 3, 8, 8), torch.arange(count)
    mixed, target = Mixing(labelled.CLASSES, mixup=0.8, mode=mode)(pixels.clone(), labels, 0)
    hot = one_hot(labels, labelled.CLASSES).float()
    torch.testing.assert_close(mixed[0], pixels[0])
    torch.testing.assert_close(target[0], hot[0])
    for i in range(1, count):
        share, partner = target[i, i], count - i
        assert 0 < share < 1
        torch.testing.assert_close(target[i], share * hot[i] + (1 - share) * hot[partner])
        torch.testing.assert_close(mixed[i], share * pixels[i] + (1 - share) * pixels[partner])


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"erasing": 1.0}])
def test_what_a_step_mixes_follows_from_the_seeds_of_its_batch(mixing):
    """A dense model that does not learn: the same images give another loss only by another draw."""
    pixels, label = labelled.images(4)
    batches = [{"image": pixels, "label": label, "seed": torch.arange(4) + start} for start in (0, 7, 0)]
    losses = []

    class Record(labelled.L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *unused):
            losses.append(float(outputs["loss"]))

    module = labelled.task(model=labelled.config(reducers={}), mixing=mixing, learning_rate=0.0, optimizer="sgd")
    labelled.trainer(callbacks=[Record()]).fit(module, DataLoader(batches, batch_size=None))
    assert losses[0] == losses[2] != losses[1]
    assert all(len(batch) == 3 and torch.equal(batch["image"], pixels) for batch in batches)


@pytest.mark.parametrize("binary", [False, True])
def test_labels_are_smoothed_once_whether_mixed_or_not(binary):
    """Mixing with probability 0 gives the same target by another way."""
    losses = []
    for mixing in (None, {"mixup": 1.0, "prob": 0.0}):
        module = labelled.task(label_smoothing=0.2, binary_cross_entropy=binary, mixing=mixing)
        losses.append(labelled.fit(module, max_steps=1, limit_val_batches=0)["train/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    hard = labelled.task(binary_cross_entropy=binary)
    assert labelled.fit(hard, max_steps=1, limit_val_batches=0)["train/loss"] != pytest.approx(losses[0], rel=1e-3)


# Two processes


@pytest.mark.parametrize("mode", ["adapt", "linear_probe", "frozen", "finetune"])
def test_two_processes_equal_one(mode, tmp_path):
    """Weights after an epoch, and validation of 13 images, which the ranks share unequally."""
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        more = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False} if world == 2 else {}
        module = labelled.task(mode=mode, optimizer="sgd", init=labelled.trained(folder))
        labelled.fit(module, callbacks=[labelled.KeepWeights(folder)], **more)
        ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
        for state, figures in ranks[1:]:
            labelled.check_same(state, ranks[0][0])
            assert {n: v for n, v in figures.items() if n.startswith("val")} == {
                n: v for n, v in ranks[0][1].items() if n.startswith("val")
            }
        found.append(ranks[0])
    (one, figures), (two, shared) = found
    labelled.check_same(two, one, rtol=1e-4, atol=1e-5)
    names = [name for name in figures if name.startswith("val/")]
    assert len(names) == 8 and math.isfinite(figures["val/loss"]) and figures["val/images"] == 13
    assert {n: shared[n] for n in names} == pytest.approx({n: figures[n] for n in names}, rel=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1; expected at least 2"),
        ({"mode": "probe"}, "mode is 'probe'; expected one of adapt, linear_probe, frozen, finetune"),
        ({"model": "vit_teeny_patch16_224"}, "no encoder is called 'vit_teeny_patch16_224'"),
        ({"model": {"preset": "vit_tiny_patch16_224", "widht": 3}}, "the vision config does not build"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"mixing": {"erasing": 2.0}}, "mixing: erasing is 2.0"),
        ({"mixing": {"mixupp": 2.0}}, "the options of mixing do not fit"),
        ({"cache_features": True}, "mode is 'finetune'; use linear_probe"),
        ({"cache_features": True, "mode": "linear_probe", "mixing": {"mixup": 1.0}}, "leave out mixing and teacher"),
        ({"compression_warmup": 5, "mode": "linear_probe"}, "which linear_probe keeps"),
        ({"compression_delay": -1}, "compression_delay is -1"),
        ({"compression_warmup": 5, "model": labelled.config(reducers={})}, "no reducer has a compression"),
        ({"mode": "adapt", "model": labelled.config(reducers={})}, "nothing to learn"),
        ({"mode": "adapt", "mixing": {"mixup": 1.0}}, "leave out mixing and teacher"),
        ({"teacher": {"model": "vit_tiny_patch16_224"}}, "expected model, and init"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        labelled.task(**options)


def test_labels_without_a_class_and_weights_of_another_width_are_refused(taught_by):
    with pytest.raises(UserError, match="have label 6, the model has classes 0 to 4; give num_classes of the data"):
        labelled.fit(labelled.task(num_classes=5))
    with pytest.raises(UserError, match="has width 32, the model has width 16"):
        labelled.fit(labelled.task(model=labelled.config(dim=16), init=taught_by["init"]))
