"""A training that is told to end: it saves after the step under way, and goes on as if it had not been stopped."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from dtpvit.cli import main

TESTS = Path(__file__).parent
AVERAGE = {"class_path": "dtpvit.tasks.weight_average.WeightAverage", "init_args": {"decay": 0.5}}


class Told(Callback):
    """Signals this process while a step, or after the first batch of a validation, is under way."""

    def __init__(self, at_step: int, by: str = "SIGTERM", within: str = "step") -> None:
        self.at_step, self.by, self.within = at_step, getattr(signal, by), within

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        if self.within == "step" and trainer.global_step == self.at_step - 1:
            os.kill(os.getpid(), self.by)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.within == "validation" and trainer.global_step == self.at_step:
            os.kill(os.getpid(), self.by)


def fit(name: str, *more: str, callbacks: list[Any] | None = None) -> int:
    Path("callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks or []}}))
    files = ["--config", "line.yaml", "--config", "callbacks.yaml"]
    return main(["fit", *files, "--data", "points.txt", "--name", name, *more])


def told(**options: Any) -> dict[str, Any]:
    return {"class_path": "test_preemption.Told", "init_args": options}


def checkpoint(name: str) -> dict[str, Any]:
    return torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)


def metrics(name: str) -> list[dict[str, str]]:
    with open(f"runs/{name}/metrics.csv", newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if {"train/loss", "val/loss"} & set(row)]


def check_same(name: str, whole: str, steps: int = 24) -> None:
    resumed, expected = checkpoint(name), checkpoint(whole)
    assert resumed["global_step"] == expected["global_step"] == steps
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[part], expected[part], rtol=0, atol=0)
    assert metrics(name) == metrics(whole)


@pytest.mark.parametrize(
    ("told_at", "more", "callbacks"),
    [
        ({"at_step": 11}, [], [AVERAGE]),
        ({"at_step": 11, "by": "SIGUSR1"}, ["--checkpoint.save_last=link"], []),
        ({"at_step": 16}, [], []),
        ({"at_step": 16, "within": "validation"}, [], [AVERAGE]),
        ({"at_step": 24, "within": "validation"}, [], []),
        ({"at_step": 12, "within": "validation"}, ["--trainer.val_check_interval=4"], []),
        ({"at_step": 16}, ["--trainer.check_val_every_n_epoch=3"], []),
        ({"at_step": 6}, ["--trainer.accumulate_grad_batches=2"], []),
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    told_at: dict[str, Any], more: list[str], callbacks: list[Any], project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert fit("stopped", *more, callbacks=[*callbacks, told(**told_at)]) == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    by, step = told_at.get("by", "SIGTERM"), told_at["at_step"]
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"dtpvit: stopped by {by} after step {step}, in epoch ")
    assert "; saved in runs/stopped/checkpoints/last.ckpt; the same command with --ckpt_path last goes on" in said
    assert checkpoint("stopped")["global_step"] == step
    assert fit("stopped", "--ckpt_path=last", *more, callbacks=callbacks) == 0
    assert fit("whole", *more, callbacks=callbacks) == 0
    check_same("stopped", "whole", 12 if "accumulate" in "".join(more) else 24)


class Forks(Callback):
    """Ends a process that was forked in a step, as a pool ends its own."""

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            child = multiprocessing.get_context("fork").Process(target=_asleep)
            child.start()
            os.kill(child.pid, signal.SIGUSR1)  # is the training's to answer
            time.sleep(0.2)
            assert child.is_alive()
            child.terminate()
            child.join(20)
            ended = child.exitcode
            child.kill()
            assert ended == -signal.SIGTERM


def _asleep() -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.1)


def test_a_process_forked_in_the_training_ends_when_it_is_told_to_and_the_training_does_not(project: Path) -> None:
    assert fit("line", callbacks=[{"class_path": "test_preemption.Forks"}]) == 0
    assert checkpoint("line")["global_step"] == 24


@pytest.mark.parametrize("more", [[], ["--trainer.check_val_every_n_epoch=2"]], ids=["", "seldom_validated"])
def test_a_run_may_be_stopped_again_and_again(more: list[str], project: Path) -> None:
    """Twice in a row at the same place, at the ends of epochs, and in the step after such an end."""
    stops = [(3, "step"), (8, "step"), (8, "validation"), (9, "step"), (16, "step"), (16, "validation"), (17, "step")]
    for step, within in stops:
        if more and (step, within) == (8, "validation"):
            continue
        assert fit("stopped", "--ckpt_path=last", *more, callbacks=[told(at_step=step, within=within)]) == 143
        assert checkpoint("stopped")["global_step"] == step
    assert fit("stopped", "--ckpt_path=last", *more) == 0
    assert fit("whole", *more) == 0
    check_same("stopped", "whole")


def test_what_is_over_when_the_signal_comes_is_done(project: Path) -> None:
    """Nothing follows the last step, so that the run ends as it would have."""
    assert fit("whole", "--trainer.limit_val_batches=0", callbacks=[told(at_step=24)]) == 0
    assert checkpoint("whole")["global_step"] == 24


def test_before_the_first_step_nothing_is_saved(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("stopped", callbacks=[told(at_step=0, within="validation")]) == 143
    assert "after step 0, in epoch 1; nothing was saved" in capfd.readouterr().err
    assert not Path("runs/stopped/checkpoints").exists()


def test_without_a_checkpoint_callback_nothing_is_saved_and_that_is_said(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit("stopped", "--checkpoint.save_last=false", callbacks=[told(at_step=4)]) == 143
    assert "after step 4, in epoch 1; nothing was saved" in capfd.readouterr().err


@pytest.fixture
def slurm(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What SLURM sets for a job of one task, and its `scontrol`, which writes down what it was asked."""
    names = {"JOB_ID": "42", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", str(project), prepend=os.pathsep)
    (project / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {project}/asked.txt\n')
    (project / "scontrol").chmod(0o755)
    return project / "asked.txt"


def test_slurm_s_signal_requeues_the_job_and_the_same_command_goes_on(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("job", callbacks=[told(at_step=11, by="SIGUSR1")]) == 143
    assert slurm.read_text() == "requeue 42\n"
    assert checkpoint("job")["global_step"] == 11 and not list(Path("runs/job").glob("hpc*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit("job") == 0
    assert fit("whole") == 0 and checkpoint("whole")["global_step"] == 24  # nothing there to go on with
    check_same("job", "whole")


def test_a_requeued_job_that_had_not_begun_sets_an_older_run_aside(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("job", "--trainer.max_epochs=1") == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert fit("job", callbacks=[told(at_step=11)]) == 143
    assert torch.load("runs/job/earlier/1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert fit("job") == 0
    assert checkpoint("job")["global_step"] == 24 and not Path("runs/job/earlier/2").exists()


def test_slurm_s_sigterm_does_not_requeue(slurm: Path) -> None:
    assert fit("job", callbacks=[told(at_step=11)]) == 143
    assert not slurm.exists() and checkpoint("job")["global_step"] == 11


def test_a_job_that_cannot_be_requeued_is_saved(slurm: Path, capfd: pytest.CaptureFixture[str], project: Path) -> None:
    (project / "scontrol").write_text("#!/bin/sh\necho not allowed >&2; exit 1\n")
    assert fit("job", callbacks=[told(at_step=11, by="SIGUSR1")]) == 143
    assert "the job 42 could not be requeued: not allowed" in capfd.readouterr().err
    assert checkpoint("job")["global_step"] == 11


def test_ctrl_c_ends_at_once_and_leaves_the_last_checkpoint_as_it_was(project: Path) -> None:
    assert fit("interrupted", callbacks=[told(at_step=11, by="SIGINT")]) == 130
    assert checkpoint("interrupted")["global_step"] == 8


def test_validate_that_is_told_to_end_does_not_end_well(project: Path) -> None:
    """Lightning would exit with 0, and a script go on without the figures."""
    assert fit("line") == 0
    Path("callbacks.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [told(at_step=0, within="validation")]}})
    )
    command = ["validate", "--config", "line.yaml", "--config", "callbacks.yaml", "--data", "points.txt"]
    assert main(command) == 143


class Twice(Callback):
    """A step that takes longer than whoever stops it has patience."""

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1.5)


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(project: Path) -> None:
    Path("twice.yaml").write_text("trainer: {callbacks: [{class_path: test_preemption.Twice}]}")
    command = [sys.executable, "-m", "dtpvit", "fit", "--config", "line.yaml", "--config", "twice.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*command, "--data", "points.txt"], env=environment, timeout=500, check=False)
    assert done.returncode == -signal.SIGTERM
    assert not Path("runs/line/checkpoints").exists()
