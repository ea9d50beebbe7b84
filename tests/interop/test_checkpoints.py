"""Weights in and out of files."""

import pickle

import open_clip
import pytest
import timm
import torch

from dtpvit.errors import UserError
from dtpvit.interop.create import build_clip, create_clip, create_encoder
from dtpvit.interop.dense_weights import load_dense
from dtpvit.interop.export import export
from dtpvit.interop.loading import Tokenize, load_clip
from dtpvit.interop.weight_files import read_checkpoint, state_of

VISION = {"image_size": 64, "patch_size": 16, "dim": 64, "depth": 3, "num_heads": 4}
CONFIG = {
    "embed_dim": 32,
    "vision": {**VISION, "reducers": {1: {"class_path": "DynamicPooling", "init_args": {"compression": 4}}}},
    "text": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def checkpoint(tmp_path):
    clip = build_clip(CONFIG)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": clip.state_dict(), "hyper_parameters": {"model": CONFIG}}, path)
    return path


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 1}}', "{}"])
def test_an_exported_folder_whose_config_is_none_is_refused(content, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(UserError, match=r"export the checkpoint anew|open_clip cannot load"):
        load_clip(model=f"local-dir:{tmp_path}")


def test_a_width_below_zero_is_refused():
    with pytest.raises(UserError, match=r"the vision config does not build: .*negative"):
        build_clip(CONFIG | {"vision": VISION | {"dim": -4}})


def test_export_is_what_open_clip_loads(checkpoint, tmp_path, capsys):
    export(str(checkpoint), str(tmp_path / "folder"))
    assert "local-dir:" in capsys.readouterr().out
    name = f"local-dir:{tmp_path / 'folder'}"
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    ours = load_clip(checkpoint=checkpoint)
    packed = load_clip(model=name)
    text = open_clip.get_tokenizer(name)(["a b", "c"])
    assert torch.equal(text, ours.tokenize(["a b", "c"]))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for model in (packed.model, theirs.eval()):
            torch.testing.assert_close(model.encode_image(images), ours.model.encode_image(images))
            torch.testing.assert_close(model.encode_text(text), ours.model.encode_text(text))
    assert hasattr(packed.model.visual, "encode") and ours.image_size == packed.image_size == (64, 64)
    assert preprocess.transforms[0].size == 64


def test_open_clip_models_load_by_name():
    loaded = load_clip(model="ViT-B-32")
    assert loaded.image_size == (224, 224) and loaded.model.encode_text(loaded.tokenize(["a"])).shape == (1, 512)


def test_tokenize_equals_open_clip_and_travels_to_workers():
    tokenize = pickle.loads(pickle.dumps(Tokenize(77)))
    captions = ["a photo of a cat", "", "word " * 200, "émoji 🙂"]
    assert torch.equal(tokenize(captions), open_clip.get_tokenizer("ViT-B-32")(captions))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_wrappers_around_a_state_are_seen_through(wrap, prefix, tmp_path):
    state = {"cls_token": torch.zeros(1), "norm.weight": torch.ones(2)}
    torch.save(wrap({prefix + name: value for name, value in state.items()}), tmp_path / "w.pt")
    assert set(state_of(read_checkpoint(tmp_path / "w.pt"))) == set(state)


def test_our_own_checkpoint_starts_another_variant(checkpoint):
    dense = create_clip({**CONFIG, "vision": VISION})
    transfer = load_dense(dense, checkpoint)
    assert not transfer.fresh and all("boundary" in name for name in transfer.left)


def test_positions_of_a_grid_that_is_not_square_are_kept(tmp_path):
    wide = {**VISION, "image_size": (32, 128)}  # 2 x 8 patches, as many as 4 x 4
    one, other = build_clip({**CONFIG, "vision": wide}), build_clip({**CONFIG, "vision": wide})
    torch.save(one.state_dict(), tmp_path / "wide.pt")
    load_dense(other, tmp_path / "wide.pt")
    assert torch.equal(other.visual.trunk.pos_embed, one.visual.trunk.pos_embed)
    images = torch.randn(2, 3, 32, 128)
    torch.testing.assert_close(other.eval().encode_image(images), one.eval().encode_image(images))


def test_another_width_another_patch_and_nothing_in_common(tmp_path):
    encoder = create_encoder("vit_tiny_patch16_224")
    torch.save(timm.create_model("vit_small_patch16_224").state_dict(), tmp_path / "small.pth")
    with pytest.raises(UserError, match="has width 384, the model has width 192"):
        load_dense(encoder, tmp_path / "small.pth")
    other = create_encoder("vit_tiny_patch32_224")
    torch.save(other.state_dict(), tmp_path / "patch32.pth")
    transfer = load_dense(encoder, tmp_path / "patch32.pth")
    assert list(transfer.left) == ["visual.trunk.patch_embed.proj.weight"]
    assert "shape (192, 3, 32, 32), here (192, 3, 16, 16)" in str(transfer)
    assert "visual.trunk.pos_embed" in transfer.taken  # resampled from 7 x 7 to 14 x 14
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="shares no tensor"):
        load_dense(encoder, tmp_path / "foreign.pth")


def test_weights_of_another_image_size_see_as_timm_s_own_do(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "224.pth")
    ours = create_encoder("vit_tiny_patch16_224", image_size=96, init=tmp_path / "224.pth").eval()
    theirs.set_input_size(img_size=96)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).pooled, theirs(images), rtol=0, atol=1e-5)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_damaged_and_foreign_files_are_refused_in_a_sentence(checkpoint, tmp_path, capsys):
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00\x01")
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps(Code()))
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    torch.save({"state_dict": create_encoder("vit_tiny_patch32_224").state_dict()}, tmp_path / "other.ckpt")
    for name in ("cut.ckpt", "text.ckpt", "cut.safetensors", "code.ckpt", "absent.ckpt", "empty.ckpt"):
        with pytest.raises(UserError) as found:
            state_of(read_checkpoint(tmp_path / name))
        assert "\n" not in str(found.value) and "weights_only=False" not in str(found.value), found.value
    assert "run" not in capsys.readouterr().out
    with pytest.raises(UserError, match="does not record which model it is; give --model"):
        load_clip(checkpoint=tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"another architecture: \d+ tensors are missing"):
        load_clip(model="DTP-ViT-B-32-10x", checkpoint=tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="no model is called 'ViT-Q'"):
        load_clip(model="ViT-Q")


def test_real_weights_keep_their_accuracy(shared_data):
    """DeiT-Tiny on every tenth photograph of the sample: timm's logits to 1e-4, and about its 77.9 % of all of them."""
    import csv

    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    reference = timm.create_model("deit_tiny_patch16_224")
    encoder = timm.create_model("dtp_vit_tiny_patch16_224_1x", num_classes=1000).eval()
    state = torch.load(shared_data / "weights/deit_tiny_patch16_224.pth", weights_only=True)["model"]
    encoder.load_state_dict(state)
    transform = create_transform(**resolve_data_config({}, model=reference))
    with open(shared_data / "imagenet_sample/labels.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[::10]
    images = torch.stack(
        [transform(Image.open(shared_data / f"imagenet_sample/{row['wnid']}.jpg").convert("RGB")) for row in rows]
    )
    reference.load_state_dict(state)
    with torch.no_grad():
        ours, theirs = encoder(images), reference.eval()(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    labels = torch.tensor([int(row["label"]) for row in rows])
    assert 0.7 < (ours.argmax(1) == labels).double().mean() < 0.87


def top1_with_minimum_variance(state, images, labels):
    """Half the patches from block 6 on, training-free: no accuracy lost."""
    reducer = {"class_path": "DynamicPooling", "init_args": {"compression": 2, "router": "minimum_variance"}}
    encoder = create_encoder("vit_tiny_patch16_224", reducers={6: reducer}).eval()
    encoder.load_state_dict({name: value for name, value in state.items() if not name.startswith("head")})
    with torch.no_grad():
        pooled = torch.cat([encoder(part).pooled for part in images.split(100)])
    logits = pooled @ state["head.weight"].T + state["head.bias"]
    return (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.slow
def test_real_weights_reach_their_known_accuracy_and_loss(shared_data):
    """All 1,000 photographs with timm's evaluation transform: 77.9 / 94.0, cross-entropy 1.022."""
    import csv

    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    encoder = timm.create_model("dtp_vit_tiny_patch16_224_1x", num_classes=1000).eval()
    state = torch.load(shared_data / "weights/deit_tiny_patch16_224.pth", weights_only=True)["model"]
    encoder.load_state_dict(state)
    transform = create_transform(**resolve_data_config({}, model=timm.create_model("deit_tiny_patch16_224")))
    with open(shared_data / "imagenet_sample/labels.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    paths = [shared_data / f"imagenet_sample/{row['wnid']}.jpg" for row in rows]
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        logits = [encoder(part) for part in images.split(100)]
    found, labels = torch.cat(logits), torch.tensor([int(row["label"]) for row in rows])
    assert top1_with_minimum_variance(state, images, labels) == pytest.approx(0.778, abs=0.003)
    top = found.topk(5).indices == labels[:, None]
    assert top[:, 0].double().mean().item() == pytest.approx(0.779, abs=0.002)
    assert top.any(1).double().mean().item() == pytest.approx(0.940, abs=0.002)
    assert torch.nn.functional.cross_entropy(found, labels).item() == pytest.approx(1.022, abs=0.003)
