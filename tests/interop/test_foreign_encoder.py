"""Towers that are not ours, behind the face of ours."""

import pytest
import timm
import torch

from dtpvit.errors import UserError
from dtpvit.evaluation.cost import counted_macs, image_macs
from dtpvit.interop.image_models import image_model, pixel_statistics


def config(name, **options):
    entry = {"class_path": "dtpvit.interop.foreign_encoder.ForeignEncoder", "init_args": {"name": name, **options}}
    return {"encoder": entry}


@pytest.mark.parametrize(("name", "grid"), [("test_vit", (10, 10)), ("test_convnext", (5, 5)), ("test_resnet", (5, 5))])
def test_features_are_those_of_timm(name, grid, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = image_model(config(name, pretrained=str(tmp_path / "weights.pt"), image_size=160), 0).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        tokens, features = ours.encode(images).tokens, theirs.forward_features(images)
    patches = features[:, theirs.num_prefix_tokens :] if features.ndim == 3 else features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.features, patches.flatten(0, 1))
    assert tokens.grid == grid and tokens.lengths.tolist() == [grid[0] * grid[1]] * 2


def test_cost_is_what_a_counter_finds():
    ours = image_model(config("test_vit", image_size=160), 0).eval()
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        found = image_macs(ours, ours.encode(images))
    assert float(found) == pytest.approx(counted_macs(ours, images), rel=1e-3)


def test_what_is_not_there_is_said():
    with pytest.raises(UserError, match="timm has no vit_of_tomorrow"):
        image_model(config("vit_of_tomorrow"), 0)
    with pytest.raises(UserError, match="does not build"):
        image_model(config("test_vit", reducers={}), 0)


def test_pixel_statistics_are_timms():
    assert pixel_statistics(config("vit_base_patch16_siglip_224")) == ((0.5,) * 3, (0.5,) * 3)
    assert pixel_statistics(config("open_clip:ViT-B-16-SigLIP", pretrained="webli")) == ((0.5,) * 3, (0.5,) * 3)
    clip = pixel_statistics(config("timm:convnext_base", pretrained="clip_laion2b"))
    assert clip[0] == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
