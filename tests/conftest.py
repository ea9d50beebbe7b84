"""What every test starts from: one thread, a fixed seed, and the real data if they are at hand."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

# The tests' tensors are small: more threads, in each of several test processes, only wait for each other.
torch.set_num_threads(1)

# How long an example takes, or all that are drawn at first, says something of the machine.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python's and torch's generators before each test, so that its order does not matter."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Each test leaves the handlers that it found: what a later one forks would not end when it is told to."""
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    left = [signal.getsignal(number) for number in HANDLED]
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)
    assert left == before


@contextmanager
def as_found() -> Iterator[None]:
    """A command and a training set variables for their process: a seed, a port that by then may be another's."""
    with patch.dict(os.environ), patch.object(sys, "path", [*sys.path]):
        yield


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Each test leaves the environment, and the places where modules are looked for, as it found them."""
    with as_found():
        yield


@pytest.fixture(autouse=True, scope="module")
def environment_of_the_file() -> Iterator[None]:
    """Likewise what is made for several tests."""
    with as_found():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data (photographs, captions, weights) beside the repository; skips if absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real data in ../shared/data, which are not part of the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def colour_assistant(tmp_path_factory) -> Path:
    """Folder of a tiny visual language model that knows three colours, see ``colour_assistant.py``."""
    from colour_assistant import make_colour_assistant

    folder = tmp_path_factory.mktemp("colour_assistant")
    make_colour_assistant(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config of 3 epochs of 8 steps, and its data, see ``cli_example.py``."""
    config = {
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "log_every_n_steps": 1},
        "model": {"class_path": "cli_example.Line"},
        "data": {"class_path": "cli_example.PointsData"},
    }
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "points.txt").write_text("32")
    monkeypatch.chdir(tmp_path)
    return tmp_path
