"""The ways to launch a run on several ranks, each tried: fragments, torchrun, ends by signals, and going on."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed import TCPStore

from dtpvit._launcher import job, started_processes, was_restarted
from dtpvit._shorthands import expand_shorthands
from dtpvit.datamodules.shapes import ShapesParameters, generate_shapes

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "configs" / "launch"
PATIENCE = 500.0  # seconds; a run takes 20
VISION = {"image_size": 32, "patch_size": 4, "dim": 32, "depth": 3, "num_heads": 2, "drop_path": 0.2}
VISION |= {"reducers": {1: {"class_path": "DynamicPooling", "init_args": {"compression": 4}}}}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CONFIG = {
    "trainer": {"max_epochs": 2, "gradient_clip_val": 1.0, "accelerator": "cpu", "log_every_n_steps": 1},
    "model": {
        "class_path": "dtpvit.tasks.contrastive.Contrastive",
        "init_args": {"model": {"embed_dim": 16, "vision": VISION, "text": TEXT}, "warmup_steps": 4},
    },
    "data": {
        "class_path": "dtpvit.datamodules.shapes.ShapesDataModule",
        "init_args": {"root": "shapes", "num_train": 96, "num_val": 22, "num_test": 1, "side": 32, "batch_size": 4}
        | {"val_batch_size": 13, "num_workers": 1, "processes": 1, "shuffle_buffer": 20},
    },
}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_fragment_sets_the_trainer_alone_and_leaves_the_run_its_name(path: Path) -> None:
    text = path.read_text()
    assert set(yaml.safe_load(text)) == {"trainer"}
    assert f"--config configs/launch/{path.name}" in text and "Expected" in text
    config = str(ROOT / "configs" / "cc12m_10x.yaml")
    reducers = str(ROOT / "configs" / "reducers" / "tome.yaml")
    for files in ([config, str(path)], [str(path), config]):
        arguments = ["--config", files[0], "--config", files[1], "--reducers", reducers]
        expanded = expand_shorthands("fit", arguments)
        assert expanded[expanded.index("--name") + 1] == "cc12m_10x-tome"


def test_the_scripts_are_shell(tmp_path: Path) -> None:
    for path in LAUNCH.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0, path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config of 2 epochs of 12 steps on two ranks, its data, and the run that nobody stopped."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    parameters = ShapesParameters(num_train=96, num_val=22, num_test=1, side=32, shard_size=12)
    generate_shapes(folder / "shapes", parameters, processes=1)
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> dict[str, Any]:
    assert code(run(project, "whole")) == 0
    return state(project, "whole")


def run(
    folder: Path, name: str, *more: str, before: tuple[str, ...] = (sys.executable,), fragment: str = "ddp"
) -> subprocess.Popen[bytes]:
    """Start a training on two ranks; ``before`` is what starts them, where it is not Lightning."""
    command = [*before, "-m", "dtpvit", "fit", "--config", "tiny.yaml", "--config", str(LAUNCH / f"{fragment}.yaml")]
    command += ["--name", name, "--checkpoint.every_n_train_steps", "1", *more]
    command += [] if len(before) > 1 else ["--trainer.devices", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def code(process: subprocess.Popen[bytes]) -> int:
    """With which the run ended; one that hangs is ended with all that it started."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def state(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)


def wait_for_a_step(folder: Path, name: str, process: subprocess.Popen[bytes]) -> None:
    last, deadline = folder / f"runs/{name}/checkpoints/last.ckpt", time.monotonic() + PATIENCE
    while not last.is_file():
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.poll() is None, (folder / f"{name}.log").read_text()
        time.sleep(0.02)
    time.sleep(float(torch.rand(())))


def second_rank(process: subprocess.Popen[bytes]) -> int:
    """The process that Lightning has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    return found


def check_same(found: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert found["global_step"] == expected["global_step"] == 24
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(found[part], expected[part], equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


def said(folder: Path, name: str) -> list[str]:
    return [line for line in (folder / f"{name}.log").read_text().splitlines() if "stopped by" in line]


@pytest.mark.slow
def test_killed_on_two_ranks_and_continued_is_as_never_killed(project: Path, whole: dict[str, Any]) -> None:
    process = run(project, "killed")
    wait_for_a_step(project, "killed", process)
    os.killpg(process.pid, signal.SIGKILL)
    assert code(process) == -signal.SIGKILL
    assert code(run(project, "killed", "--ckpt_path", "last")) == 0
    check_same(state(project, "killed"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["first", "second", "all"])
def test_told_to_end_on_two_ranks_and_continued_is_as_never_told(to: str, project: Path, whole: dict[str, Any]) -> None:
    """To all: to the loaders' processes too."""
    name = f"told_{to}"
    process = run(project, name)
    wait_for_a_step(project, name, process)
    if to == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid if to == "first" else second_rank(process), signal.SIGTERM)
    assert code(process) == 143, (project / f"{name}.log").read_text()
    (line,) = said(project, name)
    assert f"after step {state(project, name)['global_step']}," in line
    assert code(run(project, name, "--ckpt_path", "last")) == 0
    check_same(state(project, name), whole)


@pytest.mark.slow
def test_a_sharded_run_is_told_to_end_and_goes_on_sharded_or_not(project: Path, whole: dict[str, Any]) -> None:
    process = run(project, "sharded", fragment="fsdp")
    wait_for_a_step(project, "sharded", process)
    os.kill(second_rank(process), signal.SIGTERM)
    assert code(process) == 143, (project / "sharded.log").read_text()
    shutil.copytree(project / "runs/sharded", project / "runs/whole_again")
    assert code(run(project, "sharded", "--ckpt_path", "last", fragment="fsdp")) == 0
    assert code(run(project, "whole_again", "--ckpt_path", "last")) == 0
    for name in ("sharded", "whole_again"):
        check_same(state(project, name), whole, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_two_agents_of_torchrun_are_two_machines(project: Path, whole: dict[str, Any]) -> None:
    """One is told to end: both save and stop, and two go on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        end = f"127.0.0.1:{probe.getsockname()[1]}"
    agent = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    agent += ("--rdzv-backend", "c10d", "--rdzv-endpoint", end, "--local-addr", "127.0.0.1")
    agents = [run(project, "agents", before=agent) for _ in range(2)]
    wait_for_a_step(project, "agents", agents[0])
    os.kill(agents[1].pid, signal.SIGTERM)
    assert [code(each) for each in agents] == [1, 1]  # torchrun's own code, whatever its workers' was
    assert len(said(project, "agents")) == 1
    agents = [run(project, "agents", "--ckpt_path", "last", before=agent) for _ in range(2)]
    assert [code(each) for each in agents] == [0, 0]
    check_same(state(project, "agents"), whole)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "32"}, (8, 4)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}, (4, 2)),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, None),  # a shell that SLURM has opened
        ({}, None),
    ],
)
def test_how_many_processes_were_started_is_not_to_be_said_twice(
    variables: dict[str, str], expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert started_processes() == expected


@pytest.mark.parametrize("run_id", ["named", "none"])
def test_a_start_of_torchrun_is_known_after_a_restart(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of starts that nobody named, by what is left in the store of torchrun's agent, which is a real one here."""
    agent, next_agent = (TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2))
    variables = {"RUN_ID": run_id, "USE_AGENT_STORE": "True", "RESTART_COUNT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent.port))
    recorded = job()
    assert not was_restarted(recorded)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert was_restarted(recorded) and not was_restarted({}) and not was_restarted({"torchrun": "another"})
    monkeypatch.setenv("MASTER_PORT", str(next_agent.port))
    assert was_restarted(recorded) == (run_id == "named")


@pytest.mark.slow
def test_a_restart_of_torchrun_goes_on_with_its_own_run_alone(
    project: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first processes die before they train, the second ones while they do; a run of that name is there already.

    torchrun's own store would hand gloo the addresses of the processes that died (torch 2.14, docs/launch.md).
    """
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    dying = "import os, signal, torch\nfrom lightning.pytorch import Callback\n\nclass Dying(Callback):\n"
    dying += "    def setup(self, *_, **__):\n        self.die_at(0)\n\n"
    dying += "    def on_train_batch_start(self, trainer, *_):\n"
    dying += "        if trainer.global_step == 15:\n            self.die_at(1)\n\n"
    dying += "    def die_at(self, count):\n        if os.environ['TORCHELASTIC_RESTART_COUNT'] == str(count):\n"
    dying += "            os.kill(os.getpid(), signal.SIGKILL)\n"
    (project / "dying.py").write_text(dying)
    assert code(run(project, "again", "--trainer.max_epochs", "1")) == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2")
    process = run(project, "again", "--trainer.callbacks+=dying.Dying", before=torchrun)
    assert code(process) == 0, (project / "again.log").read_text()
    assert (project / "again.log").read_text().count("moved the earlier run of that name") == 1
    check_same(state(project, "again"), whole)
