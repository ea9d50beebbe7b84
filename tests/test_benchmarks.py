"""The benchmarks run, on shards made here; their numbers are for docs/results."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loading
from benchmarks.classification_rows import ROWS
from benchmarks.classification_table import compared, difference
from benchmarks.rate_at_cut import cut_boundaries
from dtpvit.errors import UserError
from dtpvit.interop.create import create_encoder


def write_shards(folder: Path, counts: tuple[int, ...]) -> Path:
    folder.mkdir()
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(count):
                pixels = np.random.RandomState(index).randint(0, 256, (40, 52, 3)).astype(np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG")
                for ending, data in (("jpg", stream.getvalue()), ("txt", b"a dog")):
                    member = tarfile.TarInfo(f"{number}{index:05d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"successes": count}))
    return folder


@pytest.mark.filterwarnings("ignore")  # those of webdataset and open_clip
def test_loading_compares_both_loaders(tmp_path, capsys):
    data, file = write_shards(tmp_path / "shards", (6, 5)), tmp_path / "results.json"
    options = ["--image-size", "16", "--batch-size", "4", "--rounds", "2", "--markdown", "--json", str(file)]
    results = loading.main(["--data", str(data), *options])
    assert json.loads(file.read_text()) == results
    assert results["images"] == 11 and results["bytes"] == {"dtpvit": 3 * 16 * 16, "open_clip": 4 * 3 * 16 * 16}
    assert len(results["rates"]) == 3 and tuple(results["stages"]) == loading.STAGES
    for row in results["rates"].values():
        assert all(len(row[lane]) == 2 and min(row[lane]) > 0 for lane in ("dtpvit", "open_clip"))
    printed = capsys.readouterr().out
    assert "| shards to batches |" in printed and "| tokenise |" in printed


@pytest.mark.filterwarnings("ignore")
def test_both_loaders_deliver_as_many_full_batches(tmp_path):
    shards = loading.expand_shards(str(write_shards(tmp_path / "shards", (6, 5))))
    for lane in (loading.Ours(shards, 16, 4), loading.OpenClip(shards, 16, 4, 11)):
        assert [tuple(batch.shape) for batch in lane.batches(0)] == [(4, 3, 16, 16)] * 2


@pytest.mark.filterwarnings("ignore")
def test_enlarged_copies_have_the_sides_asked_for(tmp_path):
    shards = loading.expand_shards(str(write_shards(tmp_path / "shards", (6, 5))))
    (large,) = loading.enlarge(shards, tmp_path, 80, 120, 8)
    with tarfile.open(large) as tar:
        images = [Image.open(tar.extractfile(member)) for member in tar if member.name.endswith(".jpg")]
        assert len(images) == 8 and all(80 <= min(image.size) <= 120 for image in images)
    assert loading.count_samples([large]) == 8


def test_the_error_of_a_paired_difference_has_both_parts():
    g = torch.Generator().manual_seed(0)
    images, seeds = 400, 3
    hard = 3 * torch.rand(images, generator=g)  # what both rows find hard does not count
    of_seeds = 0.1 * torch.randn(seeds, 1, generator=g)
    noise = 0.5 * torch.randn(images, generator=g)
    gap, error = difference(hard + 0.2 + of_seeds + noise, hard.expand(seeds, images))
    assert gap == pytest.approx(0.2 + of_seeds.mean().item() + noise.mean().item(), abs=1e-5)
    assert error**2 == pytest.approx(noise.var().item() / images + of_seeds.var().item() / seeds, rel=1e-4)
    one, one_error = difference((hard + noise)[None], hard[None])
    assert one == pytest.approx(noise.mean().item(), abs=1e-5)
    assert one_error == pytest.approx(noise.std().item() / images**0.5, rel=1e-4)


def test_the_table_marks_what_exceeds_two_standard_errors():
    def run(loss, right):
        return {"loss": [loss, loss + 0.1] * 50, "right": right, "tokens": [10.0], "gmacs": [0.5], "minutes": 2.0}

    base = [run(1.0, [0.0, 1.0] * 50), run(1.1, [0.0, 1.0] * 50)]
    better = [run(0.5, [0.0, 1.0] * 50), run(0.6, [0.0, 1.0] * 50)]
    page = compared({"base": base, "random": better}, ROWS, "base")
    (row,) = [line for line in page.splitlines() if line.startswith("| random boundaries")]
    cells = [cell.strip() for cell in row.split("|")[2:]]
    assert cells[:4] == ["50.0 (0.0)", "0.600 (0.071)", "+0.0 ± 0.0", "**-0.500 ± 0.000**"]
    assert cells[4:7] == ["10.0", "0.500", "2.0"] and "2 seeds a row, 100 test images" in page


def test_the_rate_at_the_calibrated_cut_is_that_of_evaluation():
    pooling = {"class_path": "DynamicPooling", "init_args": {"compression": 4}}
    encoder = create_encoder("vit_tiny_patch16_224", image_size=64, depth=2, reducers={1: pooling})
    images = torch.randn(4, 3, 64, 64)
    with pytest.raises(UserError, match="no calibrated threshold"):
        cut_boundaries(encoder, images)
    encoder.train()(images, seeds=torch.arange(4))
    found = cut_boundaries(encoder, images)
    assert found.patches == 64 and found.asked == 0.25
    assert found.rate(found.calibrated) == sum(found.tokens) / 64
    assert found.rate(float("-inf")) == 1 and found.rate(float("inf")) == 4 / 64
