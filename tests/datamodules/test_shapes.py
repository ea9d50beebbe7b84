"""Generated shapes: the same bytes for the same seed, true captions, and pairs that training never shows."""

import io
import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import tokenize

from dtpvit.datamodules.scenes import CLASSES, COLOURS, HELD_OUT, SEEN, SHAPES, draw_scene
from dtpvit.datamodules.shapes import ShapesDataModule, ShapesParameters, generate_shapes
from dtpvit.datamodules.shards import count_samples, expand_shards
from dtpvit.datamodules.tars import read_members
from dtpvit.errors import UserError

SMALL = ShapesParameters(seed=3, num_train=120, num_val=20, num_test=1, side=32, shard_size=50)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert generate_shapes(folder, SMALL, processes=2)
    return folder


def members(folder, ending):
    shards = expand_shards(str(folder))
    return [data for shard in shards for name, data in read_members(shard) if name.endswith(ending)]


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_bytes_depend_on_the_seed_and_not_on_the_processes(root, tmp_path):
    generate_shapes(tmp_path / "one", SMALL, processes=1)
    assert files(tmp_path / "one") == files(root)
    other = ShapesParameters(seed=4, num_train=1, num_val=1, num_test=1, side=32)
    generate_shapes(tmp_path / "two", other, processes=1)
    assert members(tmp_path / "two" / "train", "jpg")[0] not in members(root / "train", "jpg")


def test_shards_are_img2datasets(root):
    assert [Path(s).name for s in expand_shards(str(root / "train"))] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    assert count_samples(expand_shards(str(root / "train"))) == 120
    names = [name for name, _ in read_members(str(root / "train" / "00001.tar"))]
    assert names[:3] == ["000010000.jpg", "000010000.txt", "000010000.json"] and len(names) == 150
    for text, meta in zip(members(root / "val", "txt"), members(root / "val", "json"), strict=True):
        fields = json.loads(meta)
        assert fields["caption"] == text.decode() and (fields["width"], fields["status"]) == (32, "success")
    with Image.open(io.BytesIO(members(root / "val", "jpg")[0])) as image:
        assert image.size == (32, 32) and image.format == "JPEG"


def test_held_out_pairs_are_a_sixth_and_every_word_stays_frequent():
    assert len(CLASSES) == 64 and len(HELD_OUT) == 11 and sorted(SEEN + HELD_OUT) == sorted(CLASSES)
    assert min(Counter(colour for colour, _ in SEEN).values()) >= 6
    assert min(Counter(shape for _, shape in SEEN).values()) >= 6


def test_held_out_pairs_never_occur_in_training():
    drawn = Counter()
    for index in range(1500):
        scene = draw_scene(f"0/train/{index}", 16, SEEN)
        pairs = [(placed.colour, placed.shape) for placed in scene.shapes]
        assert not set(pairs) & set(HELD_OUT)
        assert not any(f"{colour} {shape}" in scene.caption for colour, shape in HELD_OUT)
        drawn.update(pairs)
    assert set(drawn) == set(SEEN) and min(drawn.values()) > 15


def test_captions_are_true_and_varied():
    captions = []
    for index in range(600):
        scene = draw_scene(f"1/{index}", 16, CLASSES)
        text, shapes = scene.caption, scene.shapes
        captions.append(text)
        there = {f"{placed.colour} {placed.shape}" for placed in shapes}
        said = set(re.findall(rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})", text))
        assert said and said <= there, text
        if " background" in text:
            assert f"on a {scene.ground} background" in text
        if number := re.search(r"\b(two|three)\b", text):
            assert len(shapes) == {"two": 2, "three": 3}[number[1]] and len(there) == 1
        for size, pair in re.findall(r"(small|large) (\w+ \w+)", text):
            pair = pair if pair in there else pair.removesuffix("es" if pair.endswith("sses") else "s")
            assert any(f"{p.colour} {p.shape}" == pair and p.size == size for p in shapes)
        _check_relation(text, shapes)
    assert len(set(captions)) > 450
    assert not any(re.search(r"\ba (orange|image)|\ban (?!orange|image)", caption) for caption in captions)
    starts = Counter(caption.split()[0] for caption in captions)
    assert {"a", "an", "two"} <= set(starts)


def _check_relation(text, shapes):
    signs = {"above": ("y", 1), "below": ("y", -1), "to the left of": ("x", 1), "to the right of": ("x", -1)}
    for word, (axis, sign) in signs.items():
        if f" {word} " not in text:
            continue
        first, second = ([p for p in shapes if f"{p.colour} {p.shape}" in half] for half in text.split(f" {word} "))
        assert any(sign * (getattr(b, axis) - getattr(a, axis)) > 0 for a in first for b in second), text


def test_shapes_stand_off_from_their_ground_and_from_each_other():
    for index in range(150):
        scene = draw_scene(f"2/{index}", 64, CLASSES)
        pixels = np.asarray(scene.image).astype(float)
        corners = [pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]]
        for placed in scene.shapes:
            assert placed.radius < placed.x < 1 - placed.radius and placed.radius < placed.y < 1 - placed.radius
            for other in scene.shapes:
                gap = np.hypot(placed.x - other.x, placed.y - other.y)
                assert placed is other or gap > placed.radius + other.radius
            near = pixels[_disc(placed, 0.9)]
            ink = np.array(COLOURS[placed.colour])
            distance = np.abs(near - ink).max(1)
            assert np.quantile(distance, 0.2) < 45, (placed, scene.caption)  # the colour is there
            assert np.linalg.norm(np.mean(corners, 0) - ink) > 50, (placed, scene.caption)


def _disc(placed, share):
    y, x = np.mgrid[0:64, 0:64] / 64
    return np.hypot(x - placed.x, y - placed.y) < share * placed.radius


def test_labelled_scenes_are_of_their_class(root):
    for split, pairs in (("seen", SEEN), ("heldout", HELD_OUT)):
        labels = [int(data) for data in members(root / split, "cls")]
        assert sorted(CLASSES[label] for label in labels) == sorted(pairs)
        for label, text in zip(labels, members(root / split, "txt"), strict=True):
            assert "{} {}".format(*CLASSES[label]) in text.decode()
        names = (root / split / "classnames.txt").read_text().splitlines()
        assert names == [f"{colour} {shape}" for colour, shape in CLASSES]
    assert files(root)["shapes.json"].startswith(b"{")


def test_a_folder_is_drawn_once_and_anew_only_for_other_parameters(root, tmp_path):
    assert not generate_shapes(root, SMALL)
    folder = tmp_path / "deep" / "shapes"
    first = ShapesParameters(num_train=8, num_val=1, num_test=1, side=16)
    assert generate_shapes(folder, first, processes=1) and not generate_shapes(folder, first, processes=1)
    assert generate_shapes(folder, ShapesParameters(num_train=9, num_val=1, num_test=1, side=16), processes=1)
    assert count_samples(expand_shards(str(folder / "train"))) == 9
    assert [path.name for path in folder.parent.iterdir()] == ["shapes"]  # nothing half-made is left


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than generated shapes"):
        generate_shapes(tmp_path, SMALL, processes=1)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be drawn"):
        ShapesParameters(num_train=0)


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("dtpvit.datamodules.shapes._write_lines", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_shapes(tmp_path / "shapes", ShapesParameters(num_train=8, num_val=1, num_test=1, side=16), processes=1)
    assert list(tmp_path.iterdir()) == []


def _killed(shard):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_drawing(tmp_path, monkeypatch):
    """As where memory runs out. A `multiprocessing.Pool` would wait for it for ever."""
    monkeypatch.setattr("dtpvit.datamodules.shapes._write_shard", _killed)
    with pytest.raises(UserError, match="draw was killed, probably for want of memory; give fewer processes"):
        generate_shapes(tmp_path / "shapes", SMALL, processes=2)
    assert list(tmp_path.iterdir()) == []


def test_the_data_module_draws_and_loads(tmp_path):
    data = ShapesDataModule(
        root=str(tmp_path / "shapes"), num_train=64, num_val=10, num_test=1, side=32, processes=1,
        batch_size=16, num_workers=0, image_size=24, tokenize=lambda texts: tokenize(["0"] * len(texts)),
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 4 and {batch["image"].shape for batch in loader} == {(16, 3, 24, 24)}
    pairs, images = data.val_dataloader()
    assert sum(len(batch["seed"]) for batch in pairs) == 10
    assert sum(len(batch["label"]) for batch in images) == len(SEEN)
    names, templates = data.zeroshot_prompts
    assert (
        names[0] == "red circle" and [template("red circle") for template in templates][1] == "a photo of a red circle"
    )
