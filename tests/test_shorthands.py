"""Short options: what they stand for, and what is said of fragments that are none."""

from pathlib import Path

import pytest

from dtpvit._shorthands import expand_shorthands
from dtpvit.cli import main
from dtpvit.encoder import DualEncoder
from dtpvit.encoder.reducers import GridPooling
from dtpvit.errors import UserError
from dtpvit.interop.loading import load_clip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "reducers").mkdir(parents=True)
    (tmp_path / "configs" / "reducers" / "tome.yaml").write_text('"0-11": {class_path: ToMe, init_args: {r: 8}}\n')
    (tmp_path / "flowers.yaml").write_text("seed_everything: 0\n")
    return tmp_path


def test_a_fragment_becomes_json_and_names_the_run(folder: Path) -> None:
    given = ["--reducers", "configs/reducers/tome.yaml", "--config", "flowers.yaml", "--trainer.max_steps", "1"]
    assert expand_shorthands("fit", given) == [
        *["--config", "flowers.yaml", "--trainer.max_steps", "1", "--name", "flowers-tome"],
        '--model.init_args.vision={"reducers": {"0-11": {"class_path": "ToMe", "init_args": {"r": 8}}}}',
    ]


def test_a_name_that_is_given_stays_and_inline_json_passes(folder: Path) -> None:
    given = ["-c", "flowers.yaml", "--name=mine", "--reducers={}", "--init", "a.pt"]
    expected = ["-c", "flowers.yaml", "--name=mine", "--model.init_args.init=a.pt"]
    expected += ['--model.init_args.vision={"reducers": {}}']
    assert expand_shorthands("fit", given) == expected


def test_a_file_of_records_is_data_where_a_mapping_is_a_config(folder: Path) -> None:
    Path("records.json").write_text('[{"id": 1}]')
    Path("data.json").write_text('{"class_path": "mine.Data"}')
    assert expand_shorthands("fit", ["--data", "records.json"]) == ["--data.init_args.train=records.json"]
    assert expand_shorthands("fit", ["--data", "data.json"]) == ["--data", "data.json"]


def test_a_checkpoint_records_the_fragment_it_was_trained_with(folder: Path) -> None:
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    small = ["--data.init_args.num_train", "32", "--data.init_args.num_val", "8", "--data.init_args.num_test", "1"]
    small += ["--data.init_args.batch_size", "16", "--data.init_args.num_workers", "0", "--trainer.max_epochs", "1"]
    small += ["--trainer.accelerator", "cpu", "--name", "grid", "--data.init_args.root", "shapes"]
    fragment = '{"reducers": {"1": {"class_path": "GridPooling", "init_args": {"window": 2}}}}'
    assert main(["fit", "--config", str(config), *small, "--model.init_args.vision", fragment]) == 0
    clip = load_clip(checkpoint="runs/grid/checkpoints/last.ckpt").model
    assert isinstance(clip, DualEncoder)
    assert isinstance(clip.visual.trunk.reducers["1"], GridPooling) and len(clip.visual.trunk.reducers) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "did you mean configs/reducers/tome.yaml?"),
        ("[1, 2]", "holds list"),
        ("{a: [}", "is no YAML"),
        ("[" * 3000, "nested too deep"),
    ],
)
def test_a_fragment_that_is_none_is_refused(folder: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (folder / "tomme.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        expand_shorthands("fit", ["--reducers", "tomme.yaml"])
    assert sentence in str(refused.value)


def test_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", "flowers.yaml", "--model", "dtpvit.tasks.classification.Classification"]
    arguments += ["--model.model", "vit_tiny_patch16_224", "--model.num_classes", "3", "--print_config"]
    with pytest.raises(SystemExit):
        main([*arguments, "--reducers", "configs/reducers/tome.yaml"])
    printed = capsys.readouterr().out
    assert "r: 8" in printed and "name: flowers-tome" in printed
    Path("nat.yaml").write_text("{class_path: NeighbourhoodEncoder, init_args: {dim: 16}}")
    with pytest.raises(SystemExit):
        main([*arguments, "--encoder", "nat.yaml"])
    printed = capsys.readouterr().out
    assert "class_path: NeighbourhoodEncoder" in printed and "name: flowers-nat" in printed
