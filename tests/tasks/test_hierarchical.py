"""Encoders that are no plain Vision Transformer: one YAML fragment under ``encoder:``, in both tasks and in and out."""

import sys
from pathlib import Path

import open_clip
import pytest
import torch
import yaml

from dtpvit.encoder import NeighbourhoodEncoder, VisionEncoder
from dtpvit.errors import UserError
from dtpvit.evaluation.cost import dense_macs
from dtpvit.evaluation.towers import dense_counterpart, load_tower
from dtpvit.interop.create import build_clip, build_trunk
from dtpvit.interop.dense_weights import load_dense
from dtpvit.interop.export import export
from dtpvit.interop.image_models import image_model, load_classifier
from dtpvit.interop.loading import load_clip
from dtpvit.interop.model_config import model_config
from dtpvit.tasks.optimization import layer_groups

sys.path.insert(0, str(Path(__file__).parent))
import labelled
import pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]

CONFIGS = Path(__file__).parents[2] / "configs"
FRAGMENTS = sorted((CONFIGS / "encoders").glob("*.yaml"))


@pytest.fixture(params=FRAGMENTS, ids=lambda path: path.stem)
def fragment(request):
    return yaml.safe_load(request.param.read_text())


def tiny(fragment):
    """The same encoder for the small images of these tests."""
    sizes = {"image_size": 32, "dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 2], "kernel_size": 3}
    return {"encoder": {**fragment, "init_args": {**fragment["init_args"], **sizes}}}


def test_a_fragment_takes_a_step_at_its_own_size(fragment):
    encoder = build_trunk({"encoder": fragment})
    encoding = encoder(torch.randn(1, 3, 224, 224))
    assert encoding.pooled.shape == (1, 256) and encoding.tokens.grid == (7, 7)
    assert 0.6e9 < float(encoder.cost(encoding.layouts).total) < 0.7e9
    encoding.pooled.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


class AllLearn(labelled.L.Callback):
    def on_after_backward(self, trainer, module):
        self.idle = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


def test_classification(fragment, tmp_path):
    task, learn = labelled.task(model=tiny(fragment), layer_decay=0.8), AllLearn()
    before = labelled.weights(task)
    figures = labelled.fit(task, callbacks=[learn])
    assert figures["val/tokens"] == 4 and 0 < figures["val/gmacs"] < 0.01 and learn.idle == []
    assert len(labelled.changed(task, {n: before[n] for n, _ in task.model.named_parameters()})) > 50
    path = tmp_path / "last.ckpt"
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save(content, path)
    images = torch.randn(3, 3, 32, 32)
    loaded = load_classifier(path).model
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), task.eval().model(images))
    again = image_model(tiny(fragment), labelled.CLASSES)
    assert not load_dense(again, path).fresh
    tower = load_tower(str(path))
    with pytest.raises(UserError, match="name a --reference"):
        dense_counterpart(tower)
    assert tower.macs(tower.encode(images)[1].layouts) == pytest.approx(1e9 * figures["val/gmacs"], rel=1e-5)


def test_later_levels_learn_faster_under_layer_decay(fragment):
    model = image_model(tiny(fragment), 3)
    groups = layer_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {name: rate[id(p)] for name, p in model.named_parameters()}
    firsts = [named[f"levels.{level}.blocks.0.norm1.weight"] for level in range(3)]
    assert named["stem.conv1.weight"] < firsts[0] < firsts[1] < firsts[2] < named["head.weight"] == 1.0
    biases = [p for name, p in model.named_parameters() if name.endswith("position_bias")]
    assert biases and all(decay[id(p)] == 0 for p in biases)


def test_contrastive(fragment, tmp_path, capsys):
    config = pairs.config() | {"vision": tiny(fragment)}
    task, learn = pairs.task(model=config), AllLearn()
    pairs.fit(task, tmp_path, callbacks=[learn])
    assert learn.idle == []
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}, path)
    ours = load_clip(checkpoint=path)
    images = torch.randn(2, 3, 32, 32)
    export(str(path), str(tmp_path / "folder"))
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}").eval()
    packed = load_clip(model=f"local-dir:{tmp_path / 'folder'}")
    with torch.no_grad():
        expected = ours.model.encode_image(images)
        torch.testing.assert_close(theirs.encode_image(images), expected)
        torch.testing.assert_close(packed.model.encode_image(images), expected)
    capsys.readouterr()


def test_an_encoder_replaces_that_of_a_published_name(fragment):
    config = model_config({"name": "DTP-ViT-B-32-10x", "vision": tiny(fragment), "embed_dim": 8})
    clip = build_clip(config)
    assert not isinstance(clip.visual.trunk, VisionEncoder) and dense_macs(clip.visual.trunk, 8) > 0


def test_timm_s_contract(fragment):
    model = image_model(tiny(fragment), 5).eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 64, 64) and model.num_features == 64
    assert model(images).shape == (2, 5)
    with pytest.raises(ValueError, match="a mean over patches is not the mean over tokens"):
        model.forward_head(features)
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, 64)
    with pytest.raises(ValueError, match="expected avg or nothing"):
        model.reset_classifier(3, "token")


def test_any_subclass_by_its_path():
    found = build_trunk(
        {"encoder": {"class_path": "dtpvit.encoder.VisionEncoder", "init_args": {"dim": 24, "num_heads": 2}}}
    )
    assert isinstance(found, VisionEncoder) and found.dim == 24
    assert isinstance(build_trunk({"encoder": {"class_path": "NeighbourhoodEncoder"}}), NeighbourhoodEncoder)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"encoder": {"class_path": "Nowhere"}}, "dtpvit has NativeSegmentationEncoder, NeighbourhoodEncoder, Vision"),
        ({"encoder": {"class_path": "no.such.module.Encoder"}}, "cannot be imported"),
        ({"encoder": {"class_path": "torch.nn.Linear"}}, "no image encoder"),
        ({"encoder": "NeighbourhoodEncoder"}, "expected class_path"),
        ({"encoder": {"class_path": "NeighbourhoodEncoder", "dim": 3}}, "expected class_path"),
        ({"encoder": {"class_path": "NeighbourhoodEncoder"}, "dim": 3}, "under its init_args"),
        ({"encoder": {"class_path": "NeighbourhoodEncoder", "init_args": {"width": 3}}}, "does not build: .*width"),
        ({"encoder": {"class_path": "NeighbourhoodEncoder", "init_args": {"merging": {"x": 1}}}}, "does not build"),
    ],
)
def test_mistakes_are_said_in_one_sentence(vision, message):
    with pytest.raises(UserError, match=message):
        build_trunk(vision)


def test_there_is_nothing_to_adapt(fragment):
    with pytest.raises(UserError, match="nothing to learn"):
        labelled.task(model=tiny(fragment), mode="adapt")
