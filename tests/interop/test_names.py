"""Names, configs and timm's contract."""

import json
import subprocess
import sys

import open_clip
import pytest
import timm
import torch

import dtpvit
from dtpvit.encoder.reducers import DynamicPooling, FixedStride
from dtpvit.errors import UserError
from dtpvit.interop.create import build_clip, create_encoder
from dtpvit.interop.model_config import NAMES, from_open_clip, model_config, to_open_clip, trunk_config, trunk_name
from dtpvit.interop.open_clip_models import CONFIGS
from dtpvit.interop.reducer_config import reducer_makers
from dtpvit.interop.timm_models import TRUNKS

SMALL = {"image_size": 64, "patch_size": 16, "dim": 64, "depth": 4, "num_heads": 4}
POOLING = {"class_path": "DynamicPooling", "init_args": {"compression": 3, "order": "raster"}}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def test_every_promised_name_exists():
    promised = [f"DTP-ViT-B-{p}-{r}x{late}" for p in (32, 16) for r in (2, 4, 10) for late in ("", "-4p8")]
    names = [name + siglip for name in promised for siglip in ("", "-siglip")]
    assert set(names) < set(NAMES) and set(NAMES) <= set(open_clip.list_models())
    assert set(TRUNKS) <= set(timm.list_models("dtp_*"))


@pytest.mark.parametrize("name", NAMES)
def test_packaged_configs_are_what_the_names_mean(name):
    packaged = json.loads((CONFIGS / f"{name}.json").read_text())
    assert packaged == to_open_clip(model_config(name))
    assert from_open_clip(packaged) == model_config(name)


def test_names_say_where_and_how_much_is_pooled():
    late = trunk_config("dtp_vit_base_patch16_clip_224_4x_4p8")
    assert list(late["reducers"]) == [4] and late["reducers"][4]["init_args"] == {"compression": 4}
    assert model_config("DTP-ViT-B-16-1x")["vision"]["reducers"] == {}
    assert model_config("DTP-ViT-B-32-2x-siglip")["init_logit_bias"] == -10


def test_any_variant_has_a_trunk_name_that_means_it():
    vision = {**SMALL, "reducers": {1: POOLING}, "readout": "mean"}
    assert trunk_config(trunk_name(vision)) == json.loads(json.dumps(vision))
    trunk = timm.create_model(trunk_name(vision))
    assert isinstance(trunk.reducers["1"], DynamicPooling) and trunk.reducers["1"].compression == 3
    with pytest.raises(UserError, match="does not hold a vision config"):
        trunk_config("dtp_vit.nonsense")


@pytest.mark.parametrize("order", ["dtpvit, timm, open_clip", "open_clip, dtpvit", "timm, dtpvit, open_clip"])
def test_names_are_registered_in_whatever_order_things_are_imported(order):
    code = f"import {order}; import timm, open_clip; n = 'DTP-ViT-B-32-10x'; assert n in open_clip.list_models()"
    code += "; assert timm.is_model('dtp_vit_base_patch32_clip_224_10x')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=500)


@pytest.fixture
def trunk():
    vision = {**SMALL, "reducers": {2: POOLING}}
    return timm.create_model(trunk_name(vision), num_classes=5).eval()


def test_timm_contract_of_the_forward_functions(trunk):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = trunk.forward_features(images)
        assert features.shape == (2, 17, 64) and trunk(images).shape == (2, 5)
        torch.testing.assert_close(trunk.forward_head(features), trunk(images))
        assert trunk.forward_head(features, pre_logits=True).shape == (2, 64)
        last, steps = trunk.forward_intermediates(images, indices=[1, 3], norm=True)
        assert [step.shape for step in steps] == [(2, 64, 4, 4)] * 2
        torch.testing.assert_close(last, features)
        torch.testing.assert_close(steps[1].flatten(2).transpose(1, 2), features[:, 1:])
        (patches, prefix), *more = trunk.forward_intermediates(
            images, indices=[0], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True, stop_early=True
        )
        assert not more and patches.shape == (2, 16, 64) and prefix.shape == (2, 1, 64)
        assert len(torch.unique(features[0, 1:], dim=0)) == 6  # ceil(16 / 3) segments
    with pytest.raises(ValueError, match="NCHW or NLC"):
        trunk.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize(
    ("name", "options", "agrees"),
    [
        ("ToMe", {"r": 5}, True),
        ("DynamicPooling", {"compression": 3}, True),
        ("Quadtree", {"thresholds": [8, 8]}, True),
        ("ToMeSD", {}, True),
        ("ToDo", {}, True),
        ("TokenLearner", {"num_tokens": 4, "fuse": True}, True),
        ("EViT", {"keep": 0.5}, False),
        ("TopK", {"keep": 0.5}, False),
        ("DynamicViT", {"keep": 0.5}, False),
        ("TokenLearner", {"num_tokens": 4}, False),
        ("SpatialGrouping", {}, False),
        ("WindowedToMe", {"by_size": False, "proportional": False}, False),
        ("WindowedToMe", {}, True),
    ],
)
def test_a_mean_of_what_is_spread_is_the_read_out_or_refused(name, options, agrees):
    vision = {**SMALL, "readout": "mean", "reducers": {1: {"class_path": name, "init_args": options}}}
    trunk, images = timm.create_model(trunk_name(vision), num_classes=5).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features, expected = trunk.forward_features(images), trunk(images)
        if agrees:
            torch.testing.assert_close(trunk.forward_head(features), expected)
            return
        assert (trunk.head(features[:, 1:].mean(1)) - expected).abs().max() > 1e-3
        with pytest.raises(ValueError, match=f"behind {name} a mean over patches"):
            trunk.forward_head(features)
        trunk.readout = "class"
        torch.testing.assert_close(trunk.forward_head(features), trunk(images))


def test_intermediates_take_the_same_decisions_as_the_forward_pass():
    random = {"class_path": "RandomBoundaries", "init_args": {"compression": 2}}
    merging = {"class_path": "ToMe", "init_args": {"r": 2}}
    trunk = timm.create_model(trunk_name({**SMALL, "reducers": {1: random, 2: random, "0,3": merging}})).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last, _ = trunk.forward_intermediates(images)
        torch.testing.assert_close(last, trunk.forward_features(images))


def test_timm_contract_of_classifier_size_and_groups(trunk):
    assert trunk.num_features == 64 and isinstance(trunk.default_cfg, dict)
    trunk.reset_classifier(0)
    assert trunk(torch.randn(1, 3, 64, 64)).shape == (1, 64)
    trunk.reset_classifier(3, global_pool="avg")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(trunk.forward_head(trunk.forward_features(images)), trunk(images))
    with pytest.raises(ValueError, match="token, avg or nothing"):
        trunk.reset_classifier(3, global_pool="max")
    trunk.set_input_size(img_size=96)
    assert trunk(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    assert trunk.no_weight_decay() <= {name for name, _ in trunk.named_parameters()}
    groups = timm.models.group_parameters(trunk, trunk.group_matcher())
    named = {name for group in groups.values() for name in group}
    assert named == {name for name, _ in trunk.named_parameters()}
    trunk.set_grad_checkpointing()
    trunk.train()(torch.randn(2, 3, 96, 96)).sum().backward()


def test_timm_arguments_are_understood_or_refused():
    name = "dtp_vit_tiny_patch16_224_4x"
    model = timm.create_model(name, img_size=64, drop_path_rate=0.2, global_pool="avg", num_classes=2)
    assert model.blocks[-1].drop_path.rate == pytest.approx(0.2) and model.readout == "mean"
    with pytest.raises(ValueError, match="patch dropout breaks the neighbourhoods"):
        timm.create_model(name, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="no pretrained weights"):
        model = timm.models.model_entrypoint(name)(pretrained=True)
    with pytest.raises(UserError, match="does not build"):
        timm.create_model(name, window=3)


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers:FutureWarning")
def test_open_clip_tower_options():
    name = "DTP-ViT-B-32-4x"
    model = open_clip.create_model(name, force_image_size=256)
    assert model.visual.trunk.grid_size == (8, 8)
    assert model.encode_image(torch.randn(1, 3, 256, 256)).shape == (1, 512)
    model.lock_image_tower(unlocked_groups=2)
    free = {n.split(".")[2] for n, p in model.visual.named_parameters() if p.requires_grad and "trunk.blocks" in n}
    assert free == {"10", "11"}
    assert not model.visual.trunk.reducers["2"].boundary_predictor.fc1.weight.requires_grad
    model.set_grad_checkpointing()
    assert model.visual.trunk.grad_checkpointing
    with pytest.raises(ValueError, match="patch dropout"):
        open_clip.create_model(name, force_patch_dropout=0.5)
    half = open_clip.create_model(name, precision="pure_bf16")
    assert half.visual.trunk.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.visual.trunk.reducers["2"].boundary_predictor.fc1.weight.dtype == torch.float32
    assert half.encode_image(torch.randn(1, 3, 224, 224, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_create_encoder_takes_reducers_in_every_form():
    for reducer in (
        FixedStride(192, compression=4),
        lambda dim: FixedStride(dim, compression=4),
        {"class_path": "FixedStride", "init_args": {"compression": 4}},
        {"class_path": "dtpvit.encoder.reducers.FixedStride", "init_args": {"compression": 4}},
    ):
        encoder = create_encoder("vit_tiny_patch16_224", image_size=64, reducers={1: reducer}).eval()
        encoding = encoder(torch.randn(2, 3, 64, 64))
        assert encoding.tokens.lengths.tolist() == [5, 5] and encoding.pooled.shape == (2, 192)
        assert encoding.losses == {}


def test_one_entry_places_reducers_at_several_blocks():
    stride = {"class_path": "FixedStride", "init_args": {"order": "hilbert"}}
    spread = {"each": {"compression": {"from": 1.0, "to": 2.0}, "proportional": [True, False, True]}}
    vision = {**SMALL, "reducers": {"0-2": {**stride, **spread}, 3: POOLING}}
    trunk = timm.create_model(trunk_name(vision))
    made = [trunk.reducers[str(block)] for block in range(4)]
    assert [reducer.compression for reducer in made] == [1.0, 1.5, 2.0, 3]
    assert [reducer.proportional for reducer in made] == [True, False, True, True]
    assert [reducer.order for reducer in made] == ["hilbert"] * 3 + ["raster"]
    config = {"1, 5-6,9": {"class_path": "FixedStride", "each": {"compression": {"from": 26, "to": 1}}}}
    assert {block: maker(8).compression for block, maker in reducer_makers(config).items()} == {
        1: 26,
        5: 17,
        6: 9,
        9: 1,
    }


def entry(**each):
    return {"class_path": "FixedStride", "each": each}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"5-3": POOLING}, "a reducer is placed at block '5-3'; expected the number"),
        ({"0,": POOLING}, "a reducer is placed at block '0,'"),
        ({"0-3": POOLING, 2: POOLING}, "block 2 is given two reducers"),
        ({"0-1": FixedStride(8, compression=2)}, "give what makes one"),
        (
            {"0-1": entry(compression=[1, 2, 3])},
            r"compression of each block is given as \[1, 2, 3\]; expected a list of 2",
        ),
        ({"0-1": entry(compression={"from": 2})}, "or from and to"),
        ({"0-1": entry(compression={"from": 2, "to": "x"})}, "or from and to"),
        ({"0-1": {"class_path": "FixedStride", "compression": 2}}, r"unknown entries \['compression'\]"),
    ],
)
def test_places_that_do_not_fit_are_refused_in_one_sentence(config, message):
    with pytest.raises(UserError, match=message) as found:
        reducer_makers(config)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_encoder("vit_huge_patch16_224"), "no encoder is called 'vit_huge_patch16_224'"),
        (lambda: create_encoder("dtp_vit_base_patch12_224_3y"), "no trunk is called"),
        (lambda: create_encoder("vit_tiny_patch16_224", reducers={"two": POOLING}), "expected the number of a block"),
        (lambda: create_encoder("vit_tiny_patch16_224", reducers={2: "DynamicPooling"}), "expected class_path"),
        (lambda: create_encoder("vit_tiny_patch16_224", reducers={2: {"class_path": "Oracle"}}), "no token reducer"),
        (
            lambda: create_encoder("vit_tiny_patch16_224", reducers={2: {"class_path": "no.Oracle"}}),
            "cannot be imported",
        ),
        (lambda: create_encoder("vit_tiny_patch16_224", reducers={20: POOLING}), "blocks 0 to 11"),
        (lambda: create_encoder("vit_tiny_patch16_224", init="nowhere.pth"), "nowhere.pth does not exist"),
        (lambda: dtpvit.create_clip("DTP-ViT-B-32-3x"), "no model is called 'DTP-ViT-B-32-3x'"),
        (lambda: build_clip({"embed_dim": 8, "vision": SMALL, "text": {**TEXT, "layer": 2}}), "text config"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call, message):
    with pytest.raises(UserError, match=message) as found:
        call()
    assert "\n" not in str(found.value)
