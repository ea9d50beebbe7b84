"""The command line: what it prints, what it writes, how it fails and how it goes on."""

import csv
import io
import math
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dtpvit
from dtpvit.cli import COMMANDS, explain, main
from dtpvit.errors import UserError

TESTS = Path(__file__).parent


@pytest.fixture
def project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the line, with the environment as it was before a command."""
    for name in ("COLUMNS", "OMP_WAIT_POLICY", "TQDM_MININTERVAL"):  # the command sets them for its process
        monkeypatch.setenv(name, os.environ.get(name, "30"))
        monkeypatch.delenv(name)
    return project


def fit(*more: str) -> int:
    return main(["fit", "--config", "line.yaml", "--data", "points.txt", *more])


def shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-m", "dtpvit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)


def checkpoint(name: str = "line") -> dict[str, Any]:
    return torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)


def table(path: str, name: str = "line") -> list[dict[str, str]]:
    with open(f"runs/{name}/{path}", newline="") as file:
        return list(csv.DictReader(file))


def metrics(name: str = "line") -> list[dict[str, str]]:
    return table("metrics.csv", name)


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


# Help


def test_help_is_quick_and_lists_every_command() -> None:
    code = """
import resource, sys
from dtpvit.cli import main
assert main(["--help"]) == 0
used = resource.getrusage(resource.RUSAGE_SELF)
assert "torch" not in sys.modules and used.ru_utime + used.ru_stime < 0.5, used
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert sum(line.startswith(f"  {command} ") for line in done.stdout.splitlines()) == 1


def test_no_command_help_and_dash_h_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    said = set()
    for arguments in ([], ["help"], ["-h"], ["--help"]):
        assert main(arguments) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1 and max(map(len, said.pop().splitlines())) <= 110


def test_version_as_a_module() -> None:
    assert shell("--version").stdout == f"dtpvit {dtpvit.__version__}\n"


@pytest.mark.parametrize("command", ["zeroshot", "export", "fit", "tune"])
def test_every_kind_of_command_lists_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["help", command])
    assert stop.value.code == 0
    expected = {"zeroshot": "--templates", "export": "--out", "fit": "--checkpoint.monitor", "tune": "--num_training"}
    assert expected[command] in capsys.readouterr().out


def test_commands_of_two_words_have_help_and_switches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["help", "data", "count"], ["data", "count", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0 and "--deep" in capsys.readouterr().out
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    # One of these numbers was asked for without reading the shards, and cannot be had.
    for switch, code in ((["--deep"], 0), (["--deep", "true"], 0), (["--deep=true"], 0), (["--deep", "false"], 2)):
        assert main(["data", "count", *switch, str(tmp_path), "--workers=1"]) == code
        assert main(["data", "count", str(tmp_path), "--workers", "1", *switch]) == code


# Mistakes: one sentence, exit code 2, no traceback

MISTAKES = {
    "command": (["fot"], "did you mean `dtpvit fit`?"),
    "half of a command": (["data"], "`dtpvit data get`, `dtpvit data count`"),
    "second half of a command": (["data", "cout"], "`dtpvit data count`"),
    "far from any command": (["xyzzy"], "`dtpvit help`"),
    "option before the command": (["--config", "line.yaml"], "a command was expected"),
    "no config": (["fit", "--data", "points.txt"], "`dtpvit fit --config FILE`"),
    "no config, but an option": (["fit", "--model.init_args.lr", "1"], "`dtpvit fit --config FILE`"),
    "a file where a folder is to be": (
        ["fit", "-c", "line.yaml", "--data", "points.txt", "--trainer.default_root_dir", "points.txt"],
        "points.txt cannot be used (File exists); correct its permissions, or give another place",
    ),
    "config file": (["fit", "--config", "lime.yaml"], "did you mean line.yaml?"),
    "option": (["fit", "-c", "line.yaml", "--model.init_args.lrr", "1"], "'lrr' is not accepted"),
    "trainer option": (["fit", "-c", "line.yaml", "--trainer.max_epoch_count", "1"], "max_epoch_count"),
    "value": (["fit", "-c", "line.yaml", "--model.init_args.lr", "abc"], "Expected a float. Got value: abc"),
    "class": (["fit", "-c", "line.yaml", "--model", "cli_example.Lime"], "no attribute 'Lime'"),
    "refused by a constructor": (
        ["fit", "-c", "line.yaml", "--data", "refused at construction"],
        "found nothing, expected points; make some.",
    ),
    "data": (["fit", "-c", "line.yaml", "--data", "nowhere"], "no points at 'nowhere'"),
    "data in a worker": (
        ["fit", "-c", "line.yaml", "--data", "points.txt", "--data.init_args.fail_at=3"]
        + ["--data.init_args.num_workers=1"],
        "dtpvit: found point 3 broken, expected a sound one; fetch the data again.\n",
    ),
    "checkpoint": (["fit", "-c", "line.yaml", "--ckpt_path", "a.ckpt"], "'a.ckpt', which does not exist"),
    "no last checkpoint": (
        ["validate", "-c", "line.yaml", "--ckpt_path", "last"],
        "no last.ckpt in runs/line",
    ),
    "accelerator": (["fit", "-c", "line.yaml", "--trainer.accelerator", "abacus"], "abacus"),
    "option of our own command": (["zeroshot", "--dada", "x"], "--dada"),
    "checkpoint of our own command": (["export", "--checkpoint", "nix.ckpt", "--out", "x"], "nix.ckpt"),
    "data of our own command": (["zeroshot", "--data", "nowhere", "--model", "DTP-ViT-B-32-10x"], "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = MISTAKES[mistake]
    assert main(arguments) == 2
    said = capsys.readouterr()
    sentences = [line for line in said.err.splitlines() if not line.startswith(f"dtpvit {dtpvit.__version__}:")]
    assert expected in said.err and "Traceback" not in said.err
    assert len(sentences) == 1 and sentences[0].startswith("dtpvit: "), said.err
    assert not (project / "runs/line/checkpoints").exists()


def test_the_debug_variable_shows_the_traceback(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTPVIT_DEBUG", "1")
    with pytest.raises(UserError, match="no points at 'nowhere'"):
        main(["fit", "--config", "line.yaml", "--data", "nowhere"])


def test_a_fault_of_ours_is_no_mistake_of_the_user() -> None:
    assert explain(ZeroDivisionError("division by zero")) is None
    try:
        try:
            raise UserError("found\n  a thing.")
        except UserError as error:
            raise RuntimeError("wrapped by a library") from error
    except RuntimeError as error:
        assert explain(error) == "found a thing."


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_output_nobody_reads_ends_quietly(unbuffered: str) -> None:
    """As behind `| head`: where output is buffered the pipe is found broken at the end, else within the command."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dtpvit", "help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=500, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("dtpvit.cli._dispatch", broken)
    with pytest.raises(BrokenPipeError):
        main(["help"])


def test_ctrl_c_exits_130(project: Path) -> None:
    stop = {"trainer": {"callbacks": [{"class_path": "cli_example.Stop", "init_args": {"at_step": 10}}]}}
    (project / "stop.yaml").write_text(yaml.safe_dump(stop))
    done = shell("fit", "--config", "stop.yaml", "--config", "line.yaml", "--data", "points.txt")
    assert done.returncode == 130 and "Traceback" not in done.stderr


# Shorthands


@pytest.mark.parametrize(
    ("arguments", "where", "value"),
    [
        (["fit", "--data", "points.txt", "-c", "line.yaml"], ("data", "init_args", "train"), "points.txt"),
        (["tune", "-c", "line.yaml", "--data", "points.txt"], ("data", "init_args", "train"), "points.txt"),
        (["fit", "-c", "line.yaml", "--data={0..9}.tar"], ("data", "init_args", "train"), "{0..9}.tar"),
        (["validate", "-c", "line.yaml", "--data", "points.txt"], ("data", "init_args", "val"), "points.txt"),
        (["fit", "-c", "line.yaml", "--data", "cli_example.OtherData"], ("data", "class_path"), None),
        (["fit", "-c", "line.yaml", "--init=a.ckpt"], ("model", "init_args", "init"), "a.ckpt"),
        (["fit", "-c", "line.yaml", "--precision", "16-mixed"], ("trainer", "precision"), "16-mixed"),
        (["fit", "-c", "line.yaml", "--trainer.max-epochs=7"], ("trainer", "max_epochs"), 7),
        (["fit", "-c", "line.yaml", "--seed_everything", "5"], ("seed_everything",), 5),
    ],
)
def test_shorthands(
    arguments: list[str],
    where: tuple[str, ...],
    value: object,
    project: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config: Any = printed_config(capsys, *arguments)
    for key in where:
        config = config[key]
    assert config == (value or "cli_example.OtherData")


@pytest.mark.parametrize(
    ("accelerator", "cuda", "bf16", "expected"),
    [
        ("auto", False, False, "32-true"),
        ("auto", True, True, "bf16-mixed"),
        ("gpu", True, False, "16-mixed"),
        ("cpu", True, True, "32-true"),
    ],
)
def test_default_precision(
    accelerator: str, cuda: bool, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtpvit._trainer_cli import default_precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert default_precision(accelerator) == expected


# Training


def test_a_run_leaves_its_folder(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    assert sorted(path.name for path in Path("runs/line").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "efficiency.csv",
        "hparams.yaml",
        "metrics.csv",
        "versions.json",
    ]
    assert checkpoint()["global_step"] == 24
    rows = metrics()
    assert [float(row["val/loss"]) for row in rows if row["val/loss"]][-1] < 3
    assert len({row["lr-AdamW"] for row in rows if row["lr-AdamW"]}) > 10
    said = capfd.readouterr()
    assert "\r" not in said.err + said.out
    assert said.err.splitlines()[0] == f"dtpvit {dtpvit.__version__}: fit -> runs/line (32-true)"
    assert sum("step 8/8" in line and "train/loss" in line for line in said.err.splitlines()) == 3
    assert sum("validation  val/loss" in line for line in said.err.splitlines()) == 3
    assert said.err.splitlines()[-1] == "dtpvit: wrote runs/line/checkpoints/last.ckpt"


def test_the_saved_config_repeats_the_run(project: Path) -> None:
    assert fit() == 0
    saved = project / "again.yaml"
    saved.write_text(Path("runs/line/config.yaml").read_text())
    first = checkpoint()["state_dict"]
    assert main(["fit", "--config", "again.yaml"]) == 0
    assert Path("runs/line/earlier/1/checkpoints/last.ckpt").exists()
    torch.testing.assert_close(checkpoint()["state_dict"], first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("killed_at", "more"), [(20, []), (12, ["--checkpoint.every_n_train_steps=5"])], ids=["epoch", "step"]
)
def test_a_killed_run_resumes_exactly(killed_at: int, more: list[str], project: Path) -> None:
    init_args = {"at_step": killed_at, "by": "SIGKILL"}
    stop = {"trainer": {"callbacks": [{"class_path": "cli_example.Stop", "init_args": init_args}]}}
    (project / "stop.yaml").write_text(yaml.safe_dump(stop))
    arguments = ["fit", "--config", "stop.yaml", "--config", "line.yaml", "--data", "points.txt", *more]
    assert shell(*arguments).returncode == -9
    assert 0 < checkpoint()["global_step"] < killed_at

    assert fit("--ckpt_path", "last", *more) == 0
    assert not Path("runs/line/earlier").exists()
    assert fit("--name", "whole") == 0
    resumed, whole = checkpoint(), checkpoint("whole")
    assert resumed["global_step"] == whole["global_step"] == 24
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    assert yaml.safe_load(Path("runs/line/config.yaml").read_text())["ckpt_path"] is None


def test_of_a_damaged_checkpoint_the_run_says_which_other_is_whole(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    last = Path("runs/line/checkpoints/last.ckpt")
    content = last.read_bytes()
    for broken in (content[:-200], content[:1000] + bytes(100) + content[1100:], b""):
        last.write_bytes(broken)
        for command in (fit, lambda *more: main(["validate", "--config", "line.yaml", "--data", "points.txt", *more])):
            capsys.readouterr()
            assert command("--ckpt_path", "last") == 2
            (said,) = [line for line in capsys.readouterr().err.splitlines() if "last.ckpt" in line and "whole" in line]
            assert said.endswith(f"give --ckpt_path {last.with_name('epoch002-step24.ckpt')}")
    assert fit("--ckpt_path", said.split()[-1], "--trainer.max_epochs", "4") == 0
    assert checkpoint()["global_step"] == 32


def test_a_run_killed_before_its_first_last_checkpoint_goes_on_from_the_newest(project: Path) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    Path("runs/line/checkpoints/last.ckpt").unlink()
    assert fit("--ckpt_path", "last") == 0
    assert checkpoint()["global_step"] == 24 and not Path("runs/line/earlier").exists()
    assert len([row for row in metrics() if row["val/loss"]]) == 3


def test_a_link_that_leads_nowhere_is_as_none(project: Path) -> None:
    """A kill came after the checkpoint that it leads to was removed, and before it led to the next."""
    assert fit("--trainer.max_epochs", "1") == 0
    last = Path("runs/line/checkpoints/last.ckpt")
    last.unlink()
    last.symlink_to("gone.ckpt")
    assert fit("--ckpt_path", "last", "--checkpoint.save_last", "link") == 0
    assert checkpoint()["global_step"] == 24 and not Path("runs/line/earlier").exists()
    assert len([row for row in metrics() if row["val/loss"]]) == 3


def test_a_full_disk_ends_the_run_in_a_sentence_with_its_last_good_checkpoint(project: Path) -> None:
    full = {"trainer": {"callbacks": [{"class_path": "cli_example.FullDisk", "init_args": {"at_step": 12}}]}}
    (project / "full.yaml").write_text(yaml.safe_dump(full))
    done = shell("fit", "--config", "full.yaml", "--config", "line.yaml", "--data", "points.txt")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert "could not be written (File too large); the last good checkpoint is " in said
    assert said.endswith("(step 8); make room and go on with --ckpt_path last")
    assert checkpoint()["global_step"] == 8 and not list(Path("runs").rglob("*.partial"))


@pytest.mark.parametrize("file", ["metrics.csv", "efficiency.csv.partial", "metrics.csv.partial"])
def test_a_full_disk_is_a_sentence_whichever_file_meets_it(
    file: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = 1 if file == "metrics.csv.partial" else 12  # the header of the metrics is written anew when an epoch ends
    full = {"class_path": "cli_example.FullDiskFor", "init_args": {"at_step": at, "file": file}}
    (project / "full.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [full]}}))
    handler = signal.getsignal(signal.SIGTERM)
    assert fit("--config", "full.yaml") == 2
    assert signal.getsignal(signal.SIGTERM) is handler, "Lightning was kept from its teardown"
    said = capsys.readouterr().err.splitlines()[-1]
    name = file.removesuffix(".partial")
    assert f"runs/line/{name} could not be written (No space left on device); " in said
    if at == 12:
        assert said.endswith("; make room and go on with --ckpt_path last")
        Path("runs/line", file).unlink(missing_ok=True)
        assert fit("--ckpt_path", "last") == 0 and checkpoint()["global_step"] == 24
    else:
        assert metrics(), "the rows before are gone"


def test_a_row_that_was_not_written_to_its_end_is_not_joined_to_the_next(project: Path) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    path = Path("runs/line/metrics.csv")
    rows = len(metrics())
    path.write_bytes(path.read_bytes() + b"0,1.25")
    assert fit("--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert len(metrics()) == 2 * rows and all(None not in row for row in metrics())


def test_a_full_disk_of_another_command_is_a_sentence_too() -> None:
    with pytest.raises(OSError) as full, open("/dev/full", "w") as file:
        file.write("?")
    assert explain(full.value) == "a file could not be written (No space left on device); make room and start again"
    assert explain(OSError(13, "Permission denied")) is None


def test_a_link_to_the_last_checkpoint_is_never_absent(project: Path) -> None:
    assert fit("--checkpoint.save_last", "link") == 0
    last = Path("runs/line/checkpoints/last.ckpt")
    assert last.is_symlink() and checkpoint()["global_step"] == 24
    assert fit("--checkpoint.save_last", "link", "--ckpt_path", "last", "--trainer.max_epochs", "4") == 0
    assert checkpoint()["global_step"] == 32 and not list(Path("runs").rglob("*.partial"))


def test_a_plugin_may_decide_the_precision(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plugin = ["--trainer.plugins+=lightning.pytorch.plugins.DoublePrecision", "--trainer.max_epochs", "1"]
    assert fit(*plugin) == 0
    assert "(DoublePrecision)" in capfd.readouterr().err
    assert checkpoint()["state_dict"]["net.1.weight"].dtype == torch.float64


def test_a_run_goes_on_twice_from_a_checkpoint_that_another_wrote_before_the_epoch_was_done(project: Path) -> None:
    last, every = str(project / "runs/line/checkpoints/last.ckpt"), ["--checkpoint.every_n_train_steps=2"]
    for number, stop in enumerate([{"at_step": 8, "saves": last}, {"at_step": 11}]):
        stopping = {"trainer": {"callbacks": [{"class_path": "cli_example.Stop", "init_args": stop}]}}
        (project / f"stop{number}.yaml").write_text(yaml.safe_dump(stopping))
        arguments = ["fit", "--config", f"stop{number}.yaml", "--config", "line.yaml", "--data", "points.txt"]
        assert main([*arguments, *every, *(["--ckpt_path", "last"] if number else [])]) == 130
    assert fit("--ckpt_path", "last", *every) == 0
    assert fit("--name", "whole", *every) == 0
    for part in ("global_step", "state_dict", "optimizer_states"):
        torch.testing.assert_close(checkpoint()[part], checkpoint("whole")[part], rtol=0, atol=0)


def test_a_resumed_run_goes_on_with_its_metrics(project: Path) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    before = metrics()
    assert fit("--ckpt_path", "last") == 0
    after = metrics()
    assert [row["step"] for row in after[: len(before)]] == [row["step"] for row in before]
    assert int(after[-1]["step"]) == 23 and len([row for row in after if row["val/loss"]]) == 3


def test_a_resumed_run_goes_on_with_its_efficiency(project: Path) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    before = table("efficiency.csv")
    assert fit("--ckpt_path", "last") == 0
    after = table("efficiency.csv")
    assert [(row["epoch"], row["steps"]) for row in after] == [("0", "8"), ("1", "8"), ("2", "8")]
    assert after[:1] == before
    assert fit("--trainer.max_epochs", "1") == 0
    assert len(table("efficiency.csv")) == 1 and len(table("earlier/1/efficiency.csv")) == 3


def test_the_efficiency_of_a_run_is_configured_or_left_out(project: Path) -> None:
    mine = ["--trainer.callbacks+=dtpvit.tasks.efficiency.EfficiencyMonitor", "--trainer.callbacks.filename=mine.csv"]
    assert fit(*mine) == 0
    assert len(table("mine.csv")) == 3 and not Path("runs/line/efficiency.csv").exists()
    logged = [float(row["efficiency/step_seconds"]) for row in metrics() if row["efficiency/step_seconds"]]
    assert logged == pytest.approx([float(row["step_seconds"]) for row in table("mine.csv")], rel=1e-4)
    assert fit("--efficiency", "false", "--name", "without") == 0
    assert not Path("runs/without/efficiency.csv").exists()
    assert not [name for name in metrics("without")[0] if name.startswith("efficiency/")]
    assert fit(*mine, "--trainer.fast_dev_run", "true", "--name", "fast") == 0
    assert not Path("runs/fast").exists()


def test_no_checkpoint_overrides_the_command_line(project: Path) -> None:
    assert fit("--model.init_args.lr", "0.25", "--trainer.max_epochs", "1") == 0
    assert checkpoint()["hyper_parameters"]["lr"] == 0.25
    path = str(Path("runs/line/checkpoints/last.ckpt").rename(project / "start.ckpt"))
    assert fit("--model.init_args.lr", "0.5", "--ckpt_path", path, "--name", "other") == 0
    assert checkpoint("other")["hyper_parameters"]["lr"] == 0.5


def test_the_last_steps_are_saved_whatever_the_interval(project: Path) -> None:
    assert fit("--checkpoint.every_n_train_steps", "10") == 0
    assert checkpoint()["global_step"] == 24


def test_a_fast_dev_run_writes_nothing(project: Path) -> None:
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not [path for path in Path("runs").rglob("*") if path.is_file()]


def test_a_run_that_does_not_start_moves_nothing(project: Path) -> None:
    assert fit() == 0
    assert main(["fit", "--config", "line.yaml", "--data", "nowhere"]) == 2
    assert checkpoint()["global_step"] == 24 and not Path("runs/line/earlier").exists()


def test_starting_from_the_weights_of_a_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    weights = "runs/line/checkpoints/last.ckpt"
    assert fit("--init", weights) == 2
    assert "give the new run another --name" in capsys.readouterr().err
    assert fit("--init", weights, "--name", "second", "--model.init_args.lr", "0") == 0
    assert checkpoint("second")["global_step"] == 24
    torch.testing.assert_close(checkpoint("second")["state_dict"], checkpoint()["state_dict"], rtol=0, atol=0)


def test_validate_repeats_the_validation_and_leaves_the_run_alone(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    expected = [float(row["val/loss"]) for row in metrics() if row["val/loss"]][-1]
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    capsys.readouterr()
    command = ["validate", "--config", "line.yaml", "--ckpt_path", "last", "--data", "points.txt"]
    assert main(command) == 0
    words = capsys.readouterr().out.replace("│", " ").split()
    assert math.isclose(float(words[words.index("val/loss") + 1]), expected, rel_tol=1e-6)
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()} == before


def test_the_config_beside_a_checkpoint_can_be_changed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    command = ["validate", "--ckpt_path", "runs/line/checkpoints/last.ckpt", "--data", "points.txt"]
    assert main([*command, "--model.init_args.lr", "0.25"]) == 0
    assert main([*command, "--model.init_args.lrr", "0.25"]) == 2
    assert "'cli_example.Line': Option 'lrr' is not accepted" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_on_a_cpu(project: Path) -> None:
    done = shell("fit", "-c", "line.yaml", "--data", "points.txt", "--trainer.devices", "2")
    assert done.returncode == 0, done.stderr
    assert checkpoint()["global_step"] == 24 and done.stderr.count("fit -> runs/line") == 1
    broken = shell("fit", "-c", "line.yaml", "--data", "nowhere", "--trainer.devices", "2")
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
