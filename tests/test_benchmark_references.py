"""What the benchmarks compare with is right: the slow forms give what the fast ones give; and every benchmark runs."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import clip_step, encoder, record, scaling, segment_mean
from benchmarks.padded import PaddedTower
from dtpvit.encoder import VisionEncoder, VisualTower
from dtpvit.encoder.reducers import DynamicPooling

REPOSITORY = Path(__file__).parents[1]


def test_the_einsum_is_our_mean():
    features = torch.randn(3, 30, 8, dtype=torch.float64, requires_grad=True)
    starts = (torch.rand(3, 30) < 0.3).double()
    starts[:, 0] = 1
    starts.requires_grad_()
    found = {}
    for way in (segment_mean.einsum_mean, segment_mean.packed_mean):
        pooled = way(features, starts)
        weight = torch.randn(pooled.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found[way] = (pooled, *torch.autograd.grad((pooled * weight).sum(), (features, starts)))
    for slow, fast in zip(*found.values(), strict=True):
        torch.testing.assert_close(slow, fast)


def test_the_padded_tower_is_our_tower():
    trunk = VisionEncoder(
        image_size=64, patch_size=8, dim=32, depth=4, num_heads=2, reducers={1: DynamicPooling(32, compression=4)}
    )
    tower, images = VisualTower(trunk, 16).train(), torch.randn(5, 3, 64, 64)
    tower(images)  # calibrates, so that counts vary from image to image
    tower.eval()
    assert not tower.encode(images)[1].tokens.layout.uniform
    torch.testing.assert_close(PaddedTower(tower)(images), tower(images), rtol=0, atol=1e-5)


def test_segment_mean_and_scaling_write_their_pages(tmp_path, capsys):
    page = tmp_path / "page.md"
    segment_mean.segment_mean(lengths=[16, 32], batch=2, dim=8, rounds=1, output=str(page))
    assert len(re.findall(r"^\| \d+ \|", page.read_text(), flags=re.MULTILINE)) == 2
    page.write_text(page.read_text() + "\n<!-- notes -->\nkept\n")
    plot = tmp_path / "plot.png"
    models = ["vit_tiny_patch16_224", "dtp_vit_tiny_patch16_224_4x"]
    scaling.scaling(models, [32, 64], [1, 2], 1, rounds=1, output=str(page), plot=str(plot))
    text = page.read_text()
    assert text.endswith("<!-- notes -->\nkept\n") and "](plot.png)" in text and plot.read_bytes()[1:4] == b"PNG"
    assert "python -m benchmarks." in capsys.readouterr().out


@pytest.mark.slow
def test_encoder_and_clip_step_write_their_pages(tmp_path, shared_data):
    page, shards = tmp_path / "page.md", str(shared_data / "captions" / "flickr8k_sq224")
    encoder.encoder(shards, [32], [2], ["fp32"], rounds=1, output=str(page))
    assert page.read_text().count("| DTP-ViT-B-32-10x |") == 2 and "padded / packed" in page.read_text()
    clip_step.clip_step(shards, ["ViT-B-32", "DTP-ViT-B-32-10x"], 2, rounds=1, output=str(page))
    assert re.search(r"\| ViT-B-32 \| .* \*\*1\.00\*\*", page.read_text())


def test_every_result_page_names_a_command_and_a_date():
    for page in (REPOSITORY / "docs" / "results").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.search(r"python -m benchmarks\.\w+|dtpvit \w+|make demo", text), page.name
        assert re.search(r"20\d\d-\d\d-\d\d", text), page.name


def test_a_table_is_markdown():
    assert record.table(["a", "b"], [[1, 2]]) == "| a | b |\n|---|---:|\n| 1 | 2 |\n"
