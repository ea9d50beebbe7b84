"""Comparing reducers in one pretrained model: rows, files, resumption, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from dtpvit.cli import main
from dtpvit.evaluation.agreement import answers
from dtpvit.evaluation.compared_rows import read_rows
from dtpvit.interop.create import create_encoder
from dtpvit.interop.pretrained import load_pretrained
from dtpvit.tasks.fitting import cross_fitted_answers, fit_reducers, has_to_fit

MODEL = "vit_tiny_patch32_224"
TABLE = """
merging:
  r 2: {"0-11": {class_path: ToMe, init_args: {r: 2}}}
  r 4: {"0-11": {class_path: ToMe, init_args: {r: 4}}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A classifier of three classes with weights of its own, twelve labelled images, and two files of rows."""
    root = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, patch_size=32)
    with torch.no_grad():
        model.head.weight.normal_()
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    torch.save(model.state_dict(), root / "vit.pt")
    coarse = torch.randint(0, 255, (12, 3, 7, 7), generator=torch.Generator().manual_seed(0)).float()
    pixels = torch.nn.functional.interpolate(coarse, 224, mode="bilinear").clamp(0, 255).to(torch.uint8)
    for number, image in enumerate(pixels):
        path = root / "images" / "abc"[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (root / "table.yaml").write_text(TABLE)
    (root / "pooling.yaml").write_text(
        "3: {class_path: DynamicPooling, init_args: {compression: 2, router: sensitivity}}"
    )
    return root


def command(project, *more, files=("table.yaml", "pooling.yaml")):
    arguments = ["compare", *files, "--model", MODEL, "--init", "vit.pt", "--images", "images", "--batch_size", "5"]
    return [*arguments, "--rounds", "1", *more]


@pytest.fixture
def inside(project, monkeypatch):
    monkeypatch.chdir(project)


def test_every_row_is_written_and_not_computed_twice(project, inside, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "found")
    assert main(command(project, "--out", out, "--fit", "images/a")) == 0
    printed = capsys.readouterr().out
    assert "merging, r 4" in printed and "pooling" in printed and "12 images" in printed
    record = json.loads((tmp_path / "found" / "comparison.json").read_text())
    with (tmp_path / "found" / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["series"] for row in table] == ["dense", "merging", "merging", "pooling"]
    page = (tmp_path / "found" / "comparison.md").read_text().splitlines()
    assert len(page) == 6 and page[3].startswith("| merging, r 2 | ") and len({line.count("|") for line in page}) == 1
    dense, two, four, _ = record["rows"]
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, patch_size=32)
    assert dense["agreement"] == 1 and dense["change"] == 0 and dense["gmacs"] == pytest.approx(macs(theirs), rel=1e-6)
    assert dense["gmacs"] > two["gmacs"] > four["gmacs"] and (two["tokens"], four["tokens"]) == (26, 4)
    assert two["speed_up"] > 0 and two["efficiency"] == pytest.approx(two["speed_up"] * two["gmacs"] / dense["gmacs"])
    assert two["change"] == pytest.approx(two["top1"] - dense["top1"])
    assert (tmp_path / "found" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "merging" in (tmp_path / "found" / "comparison.svg").read_text()

    monkeypatch.setattr("dtpvit.tasks.compare.answers", lambda *_: pytest.fail("a row was computed again"))
    assert main(command(project, "--out", out, "--fit", "images/a")) == 0
    assert json.loads((tmp_path / "found" / "comparison.json").read_text())["rows"] == record["rows"]


def macs(theirs):
    """Of a Vision Transformer of 50 tokens, from its weights."""
    n, d = 50, theirs.embed_dim
    return (49 * theirs.patch_embed.proj.weight.numel() + 12 * (12 * n * d * d + 2 * n * n * d) + 3 * d) / 1e9


def test_accuracy_is_that_of_the_dense_model(project, inside, tmp_path):
    """Against timm's own forward pass on the same pixels."""
    assert main(command(project, "--out", str(tmp_path), "--rounds", "0", "--crop_pct", "1.0")) == 0
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, patch_size=32).eval()
    theirs.load_state_dict(torch.load("vit.pt"))
    right = []
    for path in sorted(project.glob("images/*/*.png")):
        image = pil_to_tensor(Image.open(path)).float()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            right.append(theirs(((image / 255 - mean) / std)[None]).argmax().item() == "abc".index(path.parent.name))
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert rows[0]["top1"] == pytest.approx(sum(right) / 12) and rows[0]["top5"] == 1 and rows[0]["speed_up"] is None


def test_a_clip_is_compared_by_its_features(project, inside, tmp_path, capsys):
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), tmp_path / "clip.pt")
    arguments = ["compare", "table.yaml", "--model", "ViT-S-32-alt", "--init", str(tmp_path / "clip.pt")]
    assert main([*arguments, "--images", "images", "--rounds", "0", "--out", str(tmp_path), "--limit", "3"]) == 0
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert rows[0]["divergence"] < 1e-6 < rows[2]["divergence"] and rows[0]["top1"] is None
    assert "top-1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "more", "sentence"),
    [
        (["nowhere.yaml"], [], "nowhere.yaml cannot be read"),
        (["vit.pt"], [], "vit.pt is no YAML"),
        (["table.yaml", "table.yaml"], [], "two rows are called 'merging, r 2'"),
        (["table.yaml"], ["--images", "nowhere"], "nowhere"),
        (["table.yaml"], ["--images", "images/a"], "images/a"),
        (["table.yaml"], ["--limit", "0"], "limit 0"),
        (["table.yaml"], ["--out", "vit.pt"], "cannot be written"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(files, more, sentence, project, inside, capsys):
    assert main(command(project, *more, files=files)) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and "Traceback" not in printed


def test_rows_that_are_none_are_refused(tmp_path):
    for content, sentence in (("3", "holds something else"), ("a: {b: 3}", "the series 'a'")):
        (tmp_path / "rows.yaml").write_text(content)
        with pytest.raises(Exception, match=sentence):
            read_rows([str(tmp_path / "rows.yaml")])


def test_what_is_fitted_on_halves_never_saw_the_images_it_answers(project, inside):
    """Against fitting and evaluating each half by hand; and a row without anything to fit is left alone."""
    spec = {0: {"class_path": "DToMe", "init_args": {"r": 9}}, 3: read_rows(["pooling.yaml"])[1].reducers[3]}
    pixels = torch.stack([pil_to_tensor(Image.open(path)) for path in sorted(project.glob("images/*/*.png"))])
    options = {"batch_size": 4, "device": "cpu", "seed": 3}
    found = cross_fitted_answers(load_pretrained(MODEL, "vit.pt", spec), pixels, **options)
    for half in (0, 1):
        alone = load_pretrained(MODEL, "vit.pt", spec)
        assert has_to_fit(alone)
        fit_reducers(alone, pixels[1 - half :: 2], **options)
        expected = answers(alone, [pixels[half::2]], "cpu")
        torch.testing.assert_close(found.outputs[half::2], expected.outputs)
        assert torch.equal(found.tokens[half::2], expected.tokens)
    assert len(found.tokens.unique()) > 1
    assert not has_to_fit(load_pretrained(MODEL, "vit.pt", read_rows(["table.yaml"])[1].reducers))


def test_the_table_that_comes_along_builds():
    rows = read_rows([str(Path(__file__).parents[2] / "configs" / "compare" / "untrained.yaml")])
    assert len(rows) > 30
    for row in rows:
        create_encoder("vit_tiny_patch16_224", reducers=row.reducers)


@pytest.mark.parametrize(
    "options", [{}, {"router": "cosine"}, {"rate": "ratio", "estimator": "dtp"}, {"router": "local"}], ids=str
)
def test_reducers_that_draw_in_training_can_be_fitted(options, project, inside):
    spec = {3: {"class_path": "DynamicPooling", "init_args": {"compression": 3, **options}}}
    pretrained = load_pretrained(MODEL, "vit.pt", spec)
    pixels = torch.stack([pil_to_tensor(Image.open(path)) for path in sorted(project.glob("images/*/*.png"))])
    fit_reducers(pretrained, pixels, batch_size=6, device="cpu")
    assert pretrained.trunk.reducers["3"].boundary_calibration.boundary_threshold.isfinite()
    assert not any(module.training for module in pretrained.model.modules())


def test_rows_of_other_pixel_statistics_or_weights_are_other_rows(project, inside, tmp_path, monkeypatch):
    arguments = command(project, "--rounds", "0", "--out", str(tmp_path), files=["table.yaml"])
    assert main(arguments) == 0
    kept = set(tmp_path.glob("rows/*"))
    assert main([*arguments, "--mean", "[0.5,0.5,0.5]"]) == 0
    assert len(set(tmp_path.glob("rows/*")) - kept) == len(kept)


def test_rows_of_other_images_or_versions_are_computed_anew_and_it_says_why(
    project, inside, tmp_path, monkeypatch, capsys
):
    """Images of the same names, sizes and dates; the images' names and dates alone change nothing."""
    shutil.copytree("images", tmp_path / "mine")
    arguments = command(project, "--rounds", "0", "--out", str(tmp_path), files=["table.yaml"])
    arguments += ["--images", str(tmp_path / "mine")]

    def rows_and_words():
        assert main(arguments) == 0
        return len(list(tmp_path.glob("rows/*"))), capsys.readouterr().out

    count, printed = rows_and_words()
    assert count == 3 and "anew" not in printed
    image = tmp_path / "mine" / "a" / "00.png"
    image.rename(image.with_name("000.png"))
    image.with_name("000.png").touch()
    assert rows_and_words()[0] == 3
    Image.new("RGB", (224, 224)).save(image.with_name("000.png"))
    count, printed = rows_and_words()
    assert count == 6 and "3 rows of an earlier run are computed anew, other than then: pixels\n" in printed
    monkeypatch.setattr("dtpvit.tasks.compare.versions", lambda: {"dtpvit": "0.0.1"})
    count, printed = rows_and_words()
    assert count == 9 and "3 rows of an earlier run are computed anew, other than then: versions\n" in printed
    count, printed = rows_and_words()
    assert count == 9 and "anew" not in printed


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("3: {class_path: DynamicPooling, init_args: {compression: 0.5}}", "the row 'bad' does not build"),
        ("3: {class_path: ToMe, init_args: {r: 3, q: 4}}", "the row 'bad' does not build"),
        ("12: {class_path: ToMe, init_args: {r: 3}}", "block 12 of 12"),
    ],
)
def test_rows_that_cannot_be_are_found_out_before_any_is_computed(row, sentence, project, inside, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(row)
    assert main(command(project, "--out", str(tmp_path), files=["table.yaml", str(tmp_path / "bad.yaml")])) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.glob("rows/*"))


def test_what_was_never_trained_is_named(project, inside, tmp_path, capsys):
    (tmp_path / "learner.yaml").write_text("6: {class_path: TokenLearner, init_args: {num_tokens: 4}}")
    assert main(command(project, "--rounds", "0", "--out", str(tmp_path), files=[str(tmp_path / "learner.yaml")])) == 0
    assert "learner has parts that training would change" in capsys.readouterr().out
