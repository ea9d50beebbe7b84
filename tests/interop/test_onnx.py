"""Image towers as ONNX files, run in onnxruntime."""

import json

import onnx
import onnxruntime
import pytest
import torch

from dtpvit.cli import main
from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import (
    DynamicPooling,
    DynamicViT,
    EViT,
    FixedStride,
    GridPooling,
    PiToMe,
    RandomBoundaries,
    ToDo,
    TokenLearner,
    ToMe,
    ToMeSD,
    TopK,
)
from dtpvit.errors import UserError
from dtpvit.interop import onnx_file
from dtpvit.interop.create import build_clip
from dtpvit.interop.onnx_file import write_onnx


def fixed(**options):
    return {1: lambda dim: DynamicPooling(dim, compression=4, budget="fixed", **options)}


ENCODERS = {
    "dense": {},
    "fixed": {"reducers": fixed(), "readout": "mean"},
    "twice": {"reducers": {**fixed(), 2: lambda dim: DynamicPooling(dim, compression=2, budget="fixed")}},
    "cosine": {"reducers": fixed(router="cosine", estimator="dtp", null_token=True), "pre_norm": True},
    "minimum variance": {"reducers": {1: lambda dim: DynamicPooling(dim, compression=6, router="minimum_variance")}},
    "stride": {"reducers": {1: lambda dim: FixedStride(dim, compression=4, order="serpentine")}},
    "pitome": {"reducers": {0: lambda dim: PiToMe(dim, r=7), 1: lambda dim: PiToMe(dim, ratio=0.8, protect=False)}},
    "entropy": {"reducers": {1: lambda dim: DynamicPooling(dim, compression=4, budget="fixed", router="entropy")}},
    "tome": {"reducers": {block: lambda dim: ToMe(dim, r=7) for block in range(3)}},
    "tomesd": {"reducers": {block: ToMeSD for block in range(3)}},
    "todo": {"reducers": {0: ToDo, 1: lambda dim: ToDo(dim, method="max_pool"), 2: lambda dim: ToDo(dim, factor=3)}},
    "token learner": {"reducers": {1: lambda dim: TokenLearner(dim, num_tokens=5, version="1.0")}},
    "token fuser": {"reducers": {1: lambda dim: TokenLearner(dim, num_tokens=5, fuse=True)}},
    "evit": {"reducers": {block: lambda dim: EViT(dim, keep=0.6) for block in range(3)}},
    "top-k": {"reducers": {block: lambda dim: TopK(dim, keep=0.6) for block in range(3)}},
    "dynamic-vit": {"reducers": {block: lambda dim: DynamicViT(dim, keep=0.3) for block in (0, 2)}},
    "grid": {"reducers": {1: GridPooling}, "image_size": (48, 40), "act": "quick_gelu"},
}


def small(**options):
    return VisionEncoder(**({"image_size": 48, "patch_size": 8, "dim": 24, "depth": 3, "num_heads": 2} | options))


def perturb(encoder):
    """Predictors whose opinions differ, so that boundaries differ from image to image."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "boundary" in name or "fuser" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


QUICK = ("fixed", "grid", "tome", "evit", "dynamic-vit")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ENCODERS])
def test_an_encoder_gives_the_same_features_in_batches_of_any_size(name, tmp_path):
    encoder = small(**ENCODERS[name])
    perturb(encoder)
    assert write_onnx(encoder, tmp_path / "encoder.onnx") < 1e-4
    assert list(tmp_path.iterdir()) == [tmp_path / "encoder.onnx"]
    nodes = onnx.load(tmp_path / "encoder.onnx").graph.node
    assert not {node.op_type for node in nodes} & {"Loop", "Scan", "If", "NonZero"}
    assert {node.domain for node in nodes} == {""}
    images = torch.randn(7, 3, *encoder.image_size)
    with torch.no_grad():
        encoding = encoder(images)
    if isinstance(getattr(encoder.reducers, "1", None), DynamicPooling):
        assert len({tuple(image.source.tolist()) for image in encoding.tokens.split()}) == 7
    for batch in (1, 2, 7):
        torch.testing.assert_close(
            run(tmp_path / "encoder.onnx", images[:batch]), encoding.pooled[:batch], rtol=0, atol=1e-4
        )


CONFIG = {
    "embed_dim": 16,
    "vision": {
        **{"image_size": 48, "patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2},
        "reducers": {
            1: {"class_path": "DynamicPooling", "init_args": {"compression": 4, "rate": "ratio", "estimator": "dtp"}}
        },
    },
    "text": {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def checkpoint(tmp_path):
    clip = build_clip(CONFIG)
    perturb(clip)
    calibration = clip.visual.trunk.reducers["1"].boundary_calibration
    calibration.boundary_threshold.fill_(0.5)  # as training would
    torch.save({"state_dict": clip.state_dict(), "hyper_parameters": {"model": CONFIG}}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", clip.eval()


def test_the_command_writes_the_tower_with_its_projection(checkpoint, tmp_path, capsys):
    path, clip = checkpoint
    out = tmp_path / "new" / "tower.onnx"
    assert main(["export", "--checkpoint", str(path), "--onnx", str(out), "--budget", "fixed"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    notes = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(notes["preprocess_cfg"])["size"] == [48, 48]
    images = torch.randn(5, 3, 48, 48)
    with torch.no_grad():
        dynamic = clip.encode_image(images)
        clip.visual.trunk.reducers["1"].fix_budget()
        expected = clip.encode_image(images)
    assert clip.visual.encode(images)[1].layouts[1].mlp.lengths.tolist() == [10] * 5
    torch.testing.assert_close(run(out, images), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(dynamic, expected, atol=1e-3)  # the flag changes counts, hence features


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--onnx", "x.onnx"], "has a dynamic budget"),
        ([], "give --out FOLDER, --onnx FILE.onnx"),
        (["--out", "x", "--budget", "fixed"], "--budget changes the ONNX file only"),
        (["--onnx", "x.onnx", "--budget", "dynamic"], "budget"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_sentence(options, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--checkpoint", str(checkpoint[0]), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.onnx").exists()


def test_random_boundaries_and_absent_packages_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="RandomBoundaries at block 1 draws"):
        write_onnx(
            small(reducers={1: lambda d: RandomBoundaries(d, compression=2, budget="fixed")}), tmp_path / "x.onnx"
        )
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)  # what Python itself does to forbid an import
    with pytest.raises(UserError, match=r"pip install dtpvit\[onnx\]"):
        onnx_file.write_onnx(small(), tmp_path / "x.onnx")
