"""``dtpvit report`` on runs that ``dtpvit fit`` has just trained, whole and in every state of incompleteness."""

import csv
import html
import json
import os
import re
import shutil
import sys
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from browser import visit
from PIL import Image

from dtpvit.cli import main
from dtpvit.evaluation.run_figures import COLOURS, panels, thinned
from dtpvit.evaluation.run_model import TASKS, run_model, run_task
from dtpvit.evaluation.run_record import FILES, RunRecord, read_runs
from dtpvit.evaluation.run_table import grouped
from dtpvit.evaluation.trade_off import pareto_front

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # where the configs find pairs.Pairs
import conversing

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = ("ant", "bee", "cat", "dog", "emu", "fox")
VISION = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "num_heads": 2}
REDUCERS = {1: {"class_path": "DynamicPooling", "init_args": {"compression": 4}}}
CONFIG = {
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "callbacks": [{"class_path": "dtpvit.tasks.segment_monitor.SegmentMonitor", "init_args": {"images": 2}}],
    },
    "model": {
        "class_path": "dtpvit.tasks.classification.Classification",
        "init_args": {"model": {**VISION, "reducers": REDUCERS}, "num_classes": len(CLASSES), "warmup_steps": 1},
    },
    "data": {
        "class_path": "dtpvit.datamodules.labelled_images.LabelledImages",
        "init_args": {"train": "images", "val": "images", "batch_size": 6, "num_workers": 0, "get_data": "see README"},
    },
}
CLIP = {
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1},
    "model": {
        "class_path": "dtpvit.tasks.contrastive.Contrastive",
        "init_args": {
            "model": {
                "embed_dim": 8,
                "vision": {**VISION, "image_size": 32, "reducers": REDUCERS},
                "text": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
            },
            "warmup_steps": 1,
        },
    },
    "data": {"class_path": "pairs.Pairs", "init_args": {"steps": 2}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs pooled, dense and clip; the last has no validation, the first was continued."""
    root = tmp_path_factory.mktemp("trained")
    for number in range(2 * len(CLASSES)):
        file = root / "images" / CLASSES[number // 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8).numpy()).save(file)
    (root / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    (root / "clip.yaml").write_text(yaml.safe_dump(CLIP))
    before, said = Path.cwd(), sys.argv
    os.chdir(root)
    try:
        for words in (
            ["fit", "--config", "small.yaml", "--name", "pooled", "--trainer.max_epochs", "1"],
            ["fit", "--config", "small.yaml", "--name", "pooled", "--ckpt_path", "last"],
            ["fit", "--config", "small.yaml", "--name", "dense", "--model.init_args.model.reducers", "{}"],
            ["fit", "--config", "clip.yaml"],
        ):
            sys.argv = ["dtpvit", *words]
            assert main(words) == 0
    finally:
        os.chdir(before)
        sys.argv = said
    return root


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, to be spoilt."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(sys, "argv", ["dtpvit", "report", "the arguments"])
    for name in ("COLUMNS", "OMP_WAIT_POLICY", "TQDM_MININTERVAL"):  # the command sets them for its process
        monkeypatch.setenv(name, os.environ.get(name, "120"))
    return tmp_path / "project"


def report(*words: str) -> tuple[str, str]:
    assert main(["report", *words]) == 0
    page = Path("report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    return page, Path("report.md").read_text(encoding="utf-8")


def logged(run: str, file: str, column: str) -> list[float]:
    with Path("runs", run, file).open(newline="") as rows:
        return [float(row[column]) for row in csv.DictReader(rows) if row.get(column)]


def test_what_a_start_records(project):
    starts = json.loads(Path("runs/pooled/versions.json").read_text())
    assert [start["command"].split()[1] for start in starts] == ["fit", "fit"]
    assert starts[1]["command"] == "dtpvit fit --config small.yaml --name pooled --ckpt_path last"
    assert starts[0]["versions"]["torch"] == version("torch")
    assert {"dtpvit", "python", "torch", "lightning", "timm", "open_clip"} == set(starts[0]["versions"])
    assert starts[0]["processes"] == 1 and "thread" in starts[0]["device"]
    assert main(["fit", "--config", "small.yaml", "--name", "pooled", "--trainer.max_epochs", "1"]) == 0
    assert len(json.loads(Path("runs/pooled/versions.json").read_text())) == 1
    assert len(json.loads(Path("runs/pooled/earlier/1/versions.json").read_text())) == 2


def test_the_table_says_what_the_runs_logged(project):
    pooled, clip = grouped(read_runs(["runs/pooled", "runs/dense", "runs/clip"]))
    assert (pooled.title, clip.title) == ("Classification, images", "Contrastive, pairs.Pairs")
    first, second = (run.cells() for run in pooled.runs)
    assert first["top-1, %"] == f"{100 * logged('pooled', 'metrics.csv', 'val/acc1')[-1]:.1f}"
    assert first["top-5, %"] == f"{100 * logged('pooled', 'metrics.csv', 'val/acc5')[-1]:.1f}"
    assert first["GMACs"] == f"{logged('pooled', 'metrics.csv', 'val/gmacs')[-1]:.3f}"
    seconds = logged("pooled", "efficiency.csv", "step_seconds")
    assert len(seconds) == 2 and float(first["step, s"]) == pytest.approx(sum(seconds) / 2, rel=0.01)
    assert (first["resolution"], first["patch"], first["epochs"]) == ("16", "4", "2")
    assert first["model"] == "ViT of 2 blocks, width 32, DynamicPooling 4x at block 1"
    assert second["model"].endswith("dense") and (second["tokens"], second["compression"]) == ("17.0", "1.00")
    assert first["remarks"] == "judged on 12 images; continued once" and second["remarks"] == "judged on 12 images"
    (cells,) = (run.cells() for run in clip.runs)
    assert cells["GMACs"].startswith("≈ 0.0") and cells["remarks"] == "no validation yet"
    assert [panel.title for panel in panels(clip)] == ["Training loss", "Boundary rate", "Tokens in training"]


def test_a_row_says_what_was_skipped_and_what_the_figures_are_of(project):
    """Two broken images to train on and one to validate on, and a NaN in the gradient of one step."""
    shutil.copytree("images", "judged")
    for path in ("images/ant/0.png", "images/fox/11.png", "judged/bee/2.png"):
        Path(path).write_bytes(b"<html>404</html>")
    options = ["--config", "small.yaml", "--name", "bad", "--data.init_args.val", "judged"]
    assert main(["fit", *options, "--trainer.callbacks+=labelled.SpoilGradient"]) == 0
    (group,) = grouped(read_runs(["runs/bad"]))
    cells = group.runs[0].cells()
    epochs = [int(count) for count in logged("bad", "metrics.csv", "data/skipped/broken_image")]
    assert max(epochs) >= 2
    said = f"judged on 11 images; skipped samples: up to {max(epochs)} an epoch (broken image {max(epochs)}); "
    said += "left out of the last validation: 1; skipped steps: 1"
    assert cells["remarks"] == said
    page, text = report("runs/bad")
    assert said in page and said in text


def test_what_was_skipped_is_that_of_the_worst_epoch_and_of_the_last_validation(tmp_path):
    """The second epoch was continued in its middle, by a process that saw two of its bad samples."""
    rows = ["epoch,step,data/skipped/broken_image,data/skipped/no_caption,val/pairs,val/skipped,train/skipped_steps"]
    rows += ["0,9,10,2,,,", "0,9,,,8,1,", "0,9,,,,,2", "1,19,2,,,,", "1,19,,,9,,", "1,19,,,,,3"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    (group,) = grouped(read_runs([str(tmp_path)]))
    cells = group.runs[0].cells()
    said = "judged on 9 pairs; skipped samples: up to 12 an epoch (broken image 10, no caption 2); skipped steps: 3"
    assert cells["remarks"].endswith(said)


def test_an_instruction_run_whose_encoder_comes_from_another_run(project, monkeypatch):
    words = {**conversing.ENCODER, "reducers": {1: {"class_path": "ToMe", "init_args": {"r": 2}}}}
    options = {"language_model": conversing.language_model(project / "words"), "max_length": 128, "encoder": words}
    model = {"class_path": "dtpvit.tasks.instruction.Instruction", "init_args": options}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1}
    config = {"trainer": trainer, "model": model, "data": {"class_path": "conversing.Conversations"}}
    Path("first.yaml").write_text(yaml.safe_dump(config))
    del options["encoder"]
    options["init"] = "runs/first/checkpoints/last.ckpt"
    Path("second.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "first.yaml"]) == main(["fit", "--config", "second.yaml"]) == 0
    (group,) = grouped(read_runs(["runs/first", "runs/second"]))
    assert group.title == "Instruction, conversing.Conversations"
    for run in group.runs:
        cells = run.cells()
        assert cells["model"] == "ViT of 3 blocks, width 32, ToMe at block 1, words"
        assert (cells["resolution"], cells["patch"]) == ("32", "8")
        assert cells["remarks"] == "judged on 4 conversations, 4 answers"
        assert cells["exact answers, %"] == f"{100 * logged(run.record.name, 'metrics.csv', 'val/exact')[-1]:.1f}"
        assert cells["GMACs"] == f"{logged(run.record.name, 'metrics.csv', 'val/gmacs')[-1]:.3f}"


def test_the_page_and_the_text_hold_the_same(project):
    page, text = report("runs/pooled", "runs/dense", "runs/clip")
    for what in ("Classification, images", "Contrastive, pairs.Pairs", "Dominated", "not recorded"):
        assert (what.lower() in page.lower()) == (what.lower() in text.lower())
    for name in ("pooled", "dense", "clip"):
        assert re.search(rf'<th scope="row"><svg[^§]*?</svg>\s+{name}</th>', page) and f"| {name} |" in text
    for form in (html.unescape(page), text):
        assert "dtpvit report 'the arguments'" in form and "dtpvit fit --config runs/dense/config.yaml" in form
    differing = re.findall(r"^\| ((?:model|data|trainer)\.\S+) \|", text, re.MULTILINE)
    assert "model.init_args.model.reducers.1.class_path" in differing and "trainer.max_epochs" not in differing
    assert all(f">{key}</th>" in page for key in differing)
    linked = re.findall(r"\]\((report_pictures/[^)]+)\)", text)
    assert sorted(linked) == sorted(str(path) for path in Path("report_pictures").iterdir())
    for file in linked:
        Image.open(file).load()
    assert page.count("data:image/jpeg") == 2 and page.count("<figure role") == 6 + 3


def test_equal_input_gives_an_equal_report(project):
    first = report("runs/pooled", "runs/dense")
    pictures = {path.name: path.read_bytes() for path in Path("report_pictures").iterdir()}
    assert report("runs/pooled", "runs/dense") == first
    assert pictures == {path.name: path.read_bytes() for path in Path("report_pictures").iterdir()}


@pytest.fixture(scope="module")
def page(trained: Path) -> Path:
    """The report of all three runs."""
    path = trained / "page.html"
    assert (
        main(["report", *(str(trained / "runs" / name) for name in ("pooled", "dense", "clip")), "--out", str(path)])
        == 0
    )
    return path


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_a_browser_shows_it_without_scrolling_sideways(page, width, dark):
    # Outside of pictures, whose base64 holds these letters now and then: their bytes follow measured times.
    assert "http" not in re.sub("base64,[A-Za-z0-9+/=]+", "", page.read_text(encoding="utf-8"))
    count = (
        "[...document.querySelectorAll('figure svg, img')].filter(e => e.getBoundingClientRect().width > 250).length"
    )
    seen = visit(page, width, dark=dark, script=count)
    assert (seen.page_width, seen.errors, seen.requests, seen.value) == (width, [], [], 11)
    pixels = np.asarray(Image.open(seen.picture).convert("RGB"), dtype=int)
    assert pixels.shape[1] == width and (pixels[0, 0].max() < 60) == dark
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)[::7]}
    drawn = [tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5)) for colour in COLOURS[:3]]
    assert len(colours) > 100 and all(colour in colours for colour in drawn)


def test_names_and_values_are_text_whatever_they_look_like(project):
    name = "<script>alert(1)<!--$x_1$|`b`*_{{ 7 * 7 }}"
    run = Path("runs/dense").rename(Path("runs") / name)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["get_data"] = '"><img src=x onerror=alert(2)></style>'
    config["model"]["init_args"]["model"]["preset"] = "<b>bold</b>"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "versions.json").write_text(json.dumps([{"command": "</code><script>alert(3)", "device": ["<i>"]}]))
    _, text = report("runs/pooled", str(run))
    seen = visit(project / "report.html", 390, script="[document.scripts.length, document.body.innerText]")
    assert isinstance(seen.value, list) and seen.value[0] == 0
    assert (seen.errors, seen.requests, seen.page_width) == ([], [], 390)
    for shown in (name, "<img src=x", "</code><script>alert(3)", "<b>bold</b>"):
        assert shown in seen.value[1]
    outside_code = re.sub(r"^(`{3,})$.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in outside_code and "<b>bold" not in outside_code
    titles = next(line for line in text.split("\n") if line.startswith("| run | model"))
    row = next(line for line in text.split("\n") if line.startswith("| &lt;script"))
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", titles))


@pytest.mark.parametrize("kept", [names for size in (1, 6) for names in combinations(FILES, size)], ids="+".join)
def test_any_part_of_a_folder_makes_a_row(project, kept):
    for name in FILES:
        path = Path("runs/pooled") / name
        if name not in kept and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("runs/pooled/skipped.jsonl").write_text('{"cause": "no image"}\n') if "skipped.jsonl" in kept else None
    groups = grouped(read_runs(["runs/pooled", "runs/dense"]))
    run = next(run for group in groups for run in group.runs if run.record.name == "pooled")
    said = run.cells()["remarks"]
    for name in ("config.yaml", "metrics.csv", "efficiency.csv", "versions.json"):
        assert (f"no {name}" in said) == (name not in kept)
    assert ("records skipped: no image" in said) == ("skipped.jsonl" in kept)
    assert ("top-1, %" in run.cells()) == ("metrics.csv" in kept)
    assert ("step, s" in run.cells()) == ("efficiency.csv" in kept)
    assert ("model" in run.cells()) == bool({"config.yaml", "checkpoints"} & set(kept))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_model_of_every_config_is_named(path):
    run = RunRecord(path.parent, config=yaml.safe_load(path.read_text(encoding="utf-8")))
    model = run_model(run)
    assert run_task(run) in TASKS and model.name
    if run_task(run) != "Instruction":  # whose encoder may be a checkpoint's
        assert int(model.resolution) % int(model.patch) == 0
        assert ("dense" in path.stem) == model.name.endswith("dense") and ("4x" in path.stem) <= ("4x" in model.name)


def test_a_model_that_says_nothing_of_itself_is_of_the_default_size(tmp_path):
    options = {"accum_freq": 1, "model": {"embed_dim": 8, "vision": {"reducers": {}}, "text": {}}}
    model = run_model(RunRecord(tmp_path, config={"model": {"init_args": options}}))
    assert (model.name, model.resolution, model.patch) == ("ViT of 12 blocks, width 768, dense", "224", "16")


def test_broken_files_are_remarked_upon(project):
    folder = Path("runs/pooled")
    (folder / "config.yaml").write_text("model: [")
    (folder / "metrics.csv").write_bytes(b"epoch,step,train/loss\n0,1,2.5\n0,2,\xff")
    (folder / "efficiency.csv").write_text("epoch,steps,step_seconds\n0,nan,inf\n")
    (folder / "versions.json").write_text('{"command": 1')
    (folder / "skipped.jsonl").write_text("[1]\nnonsense\n")
    (Path("runs/dense") / "config.yaml").write_text("model: {init_args: [1]}")
    max(Path("runs/dense/pictures").iterdir()).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for path in (folder / "checkpoints/last.ckpt", max((folder / "pictures").iterdir())):
        path.write_bytes(path.read_bytes()[:200])
    page, _ = report("runs/pooled", "runs/dense")
    for name in ("config.yaml", "metrics.csv", "versions.json", "skipped.jsonl", "pictures/epoch001.png"):
        assert f"{name} cannot be read" in page
    assert "last.ckpt is damaged" in page


def test_names_of_folders_need_not_be_text(project):
    Path("runs/pooled").rename("runs/p\udcff")
    assert main(["report", "runs/p\udcff", "--out", "r\udcff.html"]) == 0
    assert "(r%FF_pictures/" in Path("r\udcff.md").read_text() and "p?" in Path("r\udcff.html").read_text()


def test_a_run_killed_in_its_first_epoch(project):
    folder = Path("runs/pooled")
    for name in ("efficiency.csv", "checkpoints", "pictures"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    lines = (folder / "metrics.csv").read_text().split("\n")
    (folder / "metrics.csv").write_text("\n".join(lines[:3])[:-4])
    (group,) = grouped(read_runs(["runs/pooled", "runs/dense"]))
    cells = group.runs[0].cells()
    assert cells["epochs"] == "0 of 2" and cells["remarks"].startswith("in epoch 1 of 2: stopped, or still training")
    assert cells["GMACs"] == "≈ 0.000"
    report("runs/pooled", "runs/dense")


def test_a_run_that_went_back_to_a_checkpoint_has_one_line(tmp_path):
    rows = ["epoch,step,train/loss,val/acc1", "0,10,3.0,", "0,12,,0.2", "1,20,2.0,", "1,30,9.0,"]
    rows += ["1,14,2.5,", "1,20,2.1,", "1,22,,0.4", "1,22,nan,"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    (run,) = read_runs([str(tmp_path)])
    assert run.curves == {"train/loss": [(10, 3.0), (14, 2.5), (20, 2.1)], "val/acc1": [(12, 0.2), (22, 0.4)]}


def test_two_folders_of_one_name_are_told_apart_and_one_given_twice_counts_once(project):
    shutil.copytree("runs/dense", "other/dense")
    runs = read_runs(["runs/dense", "other/dense", "runs/../runs/dense"])
    assert [run.name for run in runs] == ["runs/dense", "other/dense"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runs/nosuch"], "there is no folder runs/nosuch"),
        (["small.yaml"], "small.yaml is a file; give the run's folder"),
        (["runs"], r"runs is no folder of a run; it holds 3 of them: give runs/\*"),
        (["images"], "images is no folder of a run; expected config.yaml"),
        (["empty"], "empty is empty; give folders in which"),
        (["runs/dense", "--out", "nosuch/report.html"], "cannot be written to nosuch/report.html"),
        (["runs/dense", "--out", "report.pdf"], "'report.pdf'; expected a name that ends in .html, or a folder"),
        (["runs/dense", "--out", "small.yaml/x"], "cannot be written to small.yaml/x"),
    ],
)
def test_mistakes_are_told_in_one_sentence(project, words, expected, capsys):
    Path("empty").mkdir()
    assert main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert re.search(expected, said) and said.count("\n") == 1
    assert not Path("report.html").exists()


def test_a_folder_takes_the_report(project, capsys):
    Path("runs/begun").mkdir()
    assert main(["report", "runs/dense", "runs/begun", "--out", "reports/today"]) == 0
    assert (
        "dtpvit: wrote reports/today/report.html, and beside it report.md and report_pictures/"
        in capsys.readouterr().out
    )
    assert "the fit ended before its first step" in Path("reports/today/report.md").read_text()


def test_without_matplotlib_the_tables_remain(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page, text = report("runs/dense")
    assert "pip install &#39;dtpvit[plot]&#39;" in page and "<figure role" not in page and "17.0" in text


def test_pareto_front():
    points = [(1.0, 50.0), (1.0, 60.0), (2.0, 60.0), (3.0, 70.0), (3.0, 70.0)]
    assert pareto_front(points) == [False, True, False, True, True]


def test_many_points_are_averaged_and_few_are_not():
    few = [(step, float(step % 7)) for step in range(300)]
    assert thinned(few) == few
    many = [(step, float(step)) for step in range(1000)]
    assert len(thinned(many)) == 250 and thinned(many)[-1] == (999, 997.5)
    assert thinned([]) == []


def test_colours_are_legible_on_white_and_on_dark_and_without_green():
    def linear(colour: str) -> np.ndarray:
        value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)

    def luminance(colour: str) -> float:
        return float(linear(colour) @ [0.2126, 0.7152, 0.0722])

    for colour in COLOURS:  # WCAG 2.2, 1.4.11: 3 to 1
        assert 1.05 / (luminance(colour) + 0.05) >= 3 <= (luminance(colour) + 0.05) / (luminance("#14171c") + 0.05)
    # Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009
    deuteranopia = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = [np.clip(deuteranopia @ linear(colour), 0, 1) ** (1 / 2.4) for colour in COLOURS]
    assert min(np.abs(one - other).max() for one, other in combinations(seen, 2)) > 0.08
