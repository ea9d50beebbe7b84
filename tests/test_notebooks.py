"""The notebooks of the documentation run from beginning to end, and the outputs stored in them are those of today."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def execute():
    """``docs/hooks/execute_notebooks.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("execute_notebooks", DOCS / "hooks" / "execute_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.filterwarnings("ignore")  # those of jupyter_client and its event loop
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_a_new_run(path, execute):
    stored, fresh = (
        execute.outputs(notebook) for notebook in (nbformat.read(path, as_version=4), execute.executed(path))
    )
    for (words, numbers, pictures), (new_words, new_numbers, new_pictures) in zip(stored, fresh, strict=True):
        hint = f"run: python docs/hooks/execute_notebooks.py docs/notebooks/{path.name}"
        assert (words, pictures) == (new_words, new_pictures), hint
        for (number, percent), (new, _) in zip(numbers, new_numbers, strict=True):
            # Counts and costs are nearly exact; what was trained here differs by some points between machines.
            assert new == (pytest.approx(number, abs=8) if percent else pytest.approx(number, rel=0.02)), hint
