"""Run the notebooks of ``docs/notebooks`` and store their outputs: ``python docs/hooks/execute_notebooks.py``.

The site shows what is stored; ``tests/test_notebooks.py`` runs them again and compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
_NUMBER = re.compile(r"([-+]?\d+\.?\d*(?:e[-+]?\d+)?)( %)?")


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a new run, from its own folder, in which it may read and not write."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.record_timing = False
    client.execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Warnings name paths of this machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                _keep_smaller_picture(output.get("data", {}))
    return notebook


def _keep_smaller_picture(data: dict[str, str]) -> None:
    """IPython stores a PIL image twice."""
    kinds = sorted((kind for kind in data if kind.startswith("image/")), key=lambda kind: len(data[kind]))
    for kind in kinds[1:]:
        del data[kind]


def outputs(notebook: NotebookNode) -> list[tuple[str, list[tuple[float, bool]], int]]:
    """Of each cell of code: its printed words with ``#`` for numbers; those numbers, and whether each is a percentage;
    and how many pictures it shows."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            text = "".join(output.get("text", "") for output in cell.outputs)
            numbers = [(float(number), bool(percent)) for number, percent in _NUMBER.findall(text)]
            pictures = sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in cell.outputs)
            found.append((" ".join(_NUMBER.sub("#", text).split()), numbers, pictures))
    return found


if __name__ == "__main__":
    for file in [Path(name).resolve() for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        nbformat.write(executed(file), file)
        print(f"wrote {file}")
