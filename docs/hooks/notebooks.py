"""Notebooks of ``docs/notebooks`` as pages, with the outputs that are stored in them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and its pictures for each notebook; MkDocs itself copies the notebook."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and the pictures that it shows, by name."""
    notebook = nbformat.read(path, as_version=4)
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])  # a line of output for each line printed
    text, resources = exporter.from_notebook_node(
        notebook, {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    )
    # Behind the title: where the notebook is, since its page can only be read.
    title, rest = re.split(r"\n", text.lstrip(), maxsplit=1)
    return f"{title}\n\n[Download the notebook]({path.name}){{: download}}\n{rest}", resources["outputs"]
