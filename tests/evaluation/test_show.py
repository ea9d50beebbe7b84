"""``dtpvit show``: the pictures of known segments, of every reducer, and what the command says when it cannot draw."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dtpvit.cli import main
from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import DynamicPooling
from dtpvit.evaluation.compression_rates import set_compression
from dtpvit.evaluation.seen_segments import SeenSegments, seen_segments
from dtpvit.evaluation.segment_pictures import DARK, PALETTE, TINT, draw_heat, draw_segments, segment_colours
from dtpvit.evaluation.towers import load_tower
from dtpvit.interop.create import create_encoder

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
import conversing
import labelled
import pairs

CONFIGS = Path(__file__).parents[2] / "configs"
FRAGMENTS = sorted((CONFIGS / "reducers").glob("*.yaml"))
SMALL = {"preset": "vit_tiny_patch16_224", "dim": 24, "num_heads": 3}
WITHOUT_RATE = {"quadtree", "spatial_grouping", "token_fuser", "token_learner", "windowed_tome"}


@pytest.fixture
def photo_file(tmp_path):
    """A photograph-like file, wider than high."""
    y, x = np.mgrid[:90, :130]
    pixels = np.stack([2 * y, x, 255 * ((x // 20 + y // 20) % 2)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def weights(tmp_path):
    """Dense weights of the narrowest model that timm has."""
    path = tmp_path / "dense.pt"
    torch.save(create_encoder("vit_tiny_patch16_224").state_dict(), path)
    return str(path)


def encoder(reducers, **more):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 4, "dim": 24, "depth": 4, "num_heads": 3}
    return VisionEncoder(**(shape | more), reducers=reducers)


def seen(rows, **more):
    source = np.array(rows)
    return SeenSegments(source, int(source.max()) + 1, **more)


def test_known_segments_pixel_by_pixel():
    photo = np.full((8, 12, 3), 100, np.uint8)
    source = [[0, 0, 1], [0, 2, -1]]
    drawn = draw_segments(photo, seen(source)).pixels()
    colours = segment_colours(np.array(source))
    for row in range(8):
        for column in range(12):
            own = source[row // 4][column // 4]
            around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            inside = [(y, x) for y, x in around if 0 <= y < 8 and 0 <= x < 12]
            if any(source[y // 4][x // 4] != own for y, x in inside):
                expected = [255] * 3
            elif own < 0:
                expected = [round(100 * (1 - DARK))] * 3
            else:
                colour = PALETTE[colours[row // 4, column // 4]]
                expected = np.rint(100 * (1 - TINT) + TINT * colour.astype(float))
            assert (drawn[row, column] == expected).all(), (row, column)


def test_outlines_stay_thin_and_svg_has_the_same_edges():
    photo = np.zeros((8, 8, 3), np.uint8)
    drawing = draw_segments(photo, seen([[0, 1], [0, 1]]), style="mean")
    white = (drawing.pixels(5) == 255).all(-1)
    assert white.any(0).nonzero()[0].tolist() == [19, 20] and white[:, 19:21].all()
    assert re.search(r'd="M4 0v4M4 4v4"', drawing.svg())


def test_mean_style_and_sizes():
    photo = np.zeros((4, 8, 3), np.uint8)
    photo[:, :2], photo[:, 2:4], photo[:, 4:] = 10, 30, 200
    drawing = draw_segments(photo, seen([[0, 0, 1, 1], [0, 0, 1, 2]]), style="mean", sizes=True)
    assert drawing.fill[:, 0].tolist() == [[20, 20, 20]] * 2 and drawing.fill[1, 3].tolist() == [200, 200, 200]
    assert (drawing.opacity == 1).all() and (drawing.pixels(20) == 255).any()
    assert drawing.labels == [(1.0, 1.0, "4"), (pytest.approx(5 / 6), pytest.approx(17 / 6), "3")]
    around = draw_segments(np.zeros((3, 3, 3), np.uint8), seen([[0, 0, 0], [0, 1, 0], [0, 0, 0]]), sizes=True)
    assert around.labels == [(0.5, 1.5, "8")]  # where the centre is another's, on the nearest patch


@pytest.mark.parametrize("segments", [4, 40, 196])
def test_neighbours_differ_and_always_in_the_same_way(segments):
    """Contiguous runs of a line, and segments scattered over the image as matching makes them."""
    line = (np.arange(14 * 14) * segments // 196).reshape(14, 14)
    scattered = np.random.default_rng(0).integers(0, min(segments, 20), (14, 14))
    for source in (line, scattered, line.T):
        colours = segment_colours(source)
        assert (colours == segment_colours(source.copy())).all()
        for down, across in ((0, 1), (1, 0), (1, 1)):
            one, other = source[: 14 - down, : 14 - across], source[down:, across:]
            same = colours[: 14 - down, : 14 - across] == colours[down:, across:]
            assert not (same & (one != other)).any()
        assert all(len(set(colours[source == segment])) == 1 for segment in np.unique(source))


def test_heat_map_scales():
    heat = np.array([[0.25, 0.5], [0.75, np.nan]], np.float32)
    photo = np.full((4, 4, 3), 255, np.uint8)
    probable, ends = draw_heat(photo, seen([[0, 1], [2, -1]], heat=heat, heat_of="boundary probability"))
    assert ends == (0.0, 1.0)
    stretched, ends = draw_heat(photo, seen([[0, 1], [2, -1]], heat=heat, heat_of="class attention"))
    assert ends == (0.25, 0.75)
    assert probable.fill[0, 0].sum() > stretched.fill[0, 0].sum() and probable.fill[1, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_every_fragment_draws_and_moves_with_the_slider(path):
    """Twelve narrow blocks: what is drawn has as many tokens as the last reducer left, at any compression."""
    reducers = yaml.safe_load(path.read_text())
    torch.manual_seed(0)
    trunk = create_encoder("vit_tiny_patch16_224", dim=24, num_heads=3, reducers=reducers)
    image = torch.rand(2, 3, 224, 224).cumsum(3) / 60 - 1
    counts = []
    for compression in (None, 2.0, 6.0):
        movable = compression is None or set_compression(trunk, compression)
        assert movable == (compression is None or path.stem not in WITHOUT_RATE)
        for one in seen_segments(trunk, image):
            assert one.source.shape == (14, 14) and one.source.max() < one.tokens
            assert draw_segments(np.zeros((224, 224, 3), np.uint8), one, sizes=True).pixels().shape == (224, 224, 3)
            if one.heat is not None:
                assert one.heat_of and np.isfinite(one.heat).all()
                draw_heat(np.zeros((224, 224, 3), np.uint8), one)
        counts.append(one.tokens)
    assert trunk.training  # as it was
    if movable and path.stem not in ("hnet", "todo", "tomesd", "grid"):
        assert counts[1] == pytest.approx(98, abs=12 if path.stem == "random" else 5) and counts[2] == pytest.approx(
            33, abs=9
        ), counts
    elif movable:
        assert counts[2] < counts[1]


def test_boundary_probability_is_a_half_where_evaluation_cuts():
    """What lies above one half is a start, in whatever order the line runs, for threshold and for nominal number."""
    pooling = DynamicPooling(24, compression=4, order="hilbert")
    trunk = encoder({1: pooling}).train()
    images = torch.randn(3, 3, 32, 32)
    for calibrated in (False, True):
        if calibrated:
            trunk(images)
        assert pooling.boundary_calibration.boundary_threshold.isnan() != calibrated
        for one in seen_segments(trunk, images):
            assert int((one.heat > 0.5).sum()) == one.tokens
            starts = [np.argmax(one.source.flat == segment) for segment in range(one.tokens)]
            assert len(set(starts)) == one.tokens
    _, reduction = trunk.eval().reductions(images)[1]
    assert reduction.heat is not None and trunk.train().reductions(images)[1][1].heat is None


def test_the_heat_of_patches_that_went_into_one_token_is_that_tokens():
    """A second reducer sees tokens; the first one's heat is drawn, of patches."""
    trunk = encoder({1: DynamicPooling(24, compression=2), 2: DynamicPooling(24, compression=2)})
    (one,) = seen_segments(trunk, torch.randn(1, 3, 32, 32))
    assert one.tokens == 16 and int((one.heat > 0.5).sum()) == 32


@pytest.mark.parametrize("patch, size", [(8, (32, 64)), (32, (96, 64)), (16, (48, 80))])
def test_patches_and_images_of_other_shapes(patch, size):
    trunk = encoder({1: DynamicPooling(24, compression=3)}, image_size=size, patch_size=patch)
    (one,) = seen_segments(trunk, torch.randn(1, 3, *size))
    assert one.source.shape == (size[0] // patch, size[1] // patch)
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert draw_segments(photo, one).pixels(2).shape == (2 * size[0], 2 * size[1], 3)


class Page(HTMLParser):
    """Which stops every figure has, which of them are seen, and every address."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.addresses, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "figure":
            self.figures.append({})
        if "data-stop" in given:
            self.figures[-1][int(given["data-stop"])] = "hidden" not in given
        self.ids.add(given.get("id"))
        self.addresses += [given[name] for name in ("href", "src", "action") if name in given]


def test_page_with_slider_needs_nothing_else(photo_file, weights, tmp_path):
    page = tmp_path / "page.html"
    fragments = [str(CONFIGS / "reducers" / name) for name in ("entropy.yaml", "tome.yaml")]
    options = ["--model", "vit_tiny_patch16_224", "--init", weights, "--reducers", *fragments]
    assert main(["show", photo_file, *options, "--out", str(page)]) == 0
    text = page.read_text()
    found = Page(text)
    last = int(re.search(r'id="compression"[^>]* max="(\d+)"', text)[1])
    image, *moving = found.figures
    assert image == {} and len(moving) == 3  # one heat map
    assert all(stops == {number: number == 0 for number in range(last + 1)} for stops in moving)
    assert "http" not in text.replace("https://", "http://") and "url(" not in text and "@import" not in text
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= found.ids
    assert len({address for address in found.addresses if address.startswith("data:")}) == 1  # one photograph, once
    tokens = [int(count) for count in re.findall(r"(\d+) tokens of 196", text)]
    assert tokens[:8] == [49, 131, 98, 66, 49, 33, 25, 17]


def test_checkpoints_of_all_tasks_side_by_side(photo_file, tmp_path, capsys):
    language_model = conversing.language_model(tmp_path / "language_model")
    files = []
    for name, task in (
        ("classes", labelled.task()),
        ("pairs", pairs.task()),
        ("chat", conversing.task(language_model)),
    ):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(
            {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "pytorch-lightning_version": "2"},
            path,
        )
        files.append(str(path))
    out = tmp_path / "all.svg"
    assert main(["show", photo_file, "--checkpoint", *files, "--orders", "raster,hilbert", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("classes, last, raster", "pairs, last, hilbert", "chat, last, raster"):
        assert name in said and name in out.read_text()
    tower = load_tower(files[2])
    assert tower.resize_mode == "longest" and tuple(tower.image_size) == (32, 32)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_picture_of_a_whole_photograph(format, photo_file, weights, tmp_path):
    """Brought to its own shape, 128 x 176 pixels, in two orders: image, heat map and segments twice."""
    out = tmp_path / f"segments.{format.lower().replace('jpeg', 'jpg')}"
    options = ["--model", "vit_tiny_patch16_224", "--init", weights, "--image-size", "[128, 176]"]
    fragment = str(CONFIGS / "reducers" / "random.yaml")
    arguments = [photo_file, *options, "--reducers", fragment, "--orders", "raster,serpentine", "--out", str(out)]
    assert main(["show", *arguments]) == 0
    with Image.open(out) as picture:
        assert picture.format == format
        assert picture.size[0] == 2 * 24 + 3 * 3 * 176 + 2 * 20


MISTAKES = {
    "nothing to show": ([], "give --checkpoint FILE, or --model NAME --reducers FILE"),
    "no model": (["--reducers", "configs/reducers/tome.yaml"], "--model and --reducers go together"),
    "format": (["--checkpoint", "x.ckpt", "--out", "x.pdf"], "ends in .png, .jpg, .svg, .html"),
    "folder": (["--checkpoint", "x.ckpt", "--out", "nowhere/x.png"], "cannot be written to nowhere/x.png"),
    "foreign": (["--checkpoint", "vit_tiny_patch16_224"], "is no encoder of dtpvit's"),
    "missing": (["--checkpoint", "none.ckpt"], "none.ckpt"),
    "order": (["--checkpoint", "dtp_vit_tiny_patch16_224_4x", "--orders", "spiral"], "names 'spiral'"),
    "size": (["--checkpoint", "dtp_vit_tiny_patch16_224_4x", "--image-size", "[100, 100]"], "not a multiple"),
    "limit": (["--checkpoint", "dtp_vit_tiny_patch16_224_4x", "--limit", "0"], "limit is 0"),
}


@pytest.mark.parametrize("options, sentence", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, sentence, photo_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", photo_file, *options]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_an_image_that_is_not_there(tmp_path, capsys):
    options = ["--checkpoint", "dtp_vit_tiny_patch16_224_4x", "--out", str(tmp_path / "x.png")]
    assert main(["show", str(tmp_path / "none.jpg"), *options]) == 2
    assert "none.jpg" in capsys.readouterr().err
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert main(["show", str(tmp_path / "broken.jpg"), *options]) == 2
    assert "has 0 images that can be read" in capsys.readouterr().err
