"""A teacher for the tests of the classification task."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from labelled import config, task


@pytest.fixture(scope="session")
def taught_by(tmp_path_factory):
    """A dense classifier of the student's size that answers with conviction."""
    module = task(model=config(reducers={}))
    with torch.no_grad():
        module.model.head.weight.mul_(30)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(module.state_dict(), path)
    return {"model": config(reducers={}), "init": str(path)}
