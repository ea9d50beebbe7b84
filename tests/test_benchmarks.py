"""The benchmarks run, on shards made here; their numbers are for docs/results."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import loading


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
