"""The reference: a page for every public module, from its docstrings, and their part of the navigation."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "dtpvit"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and ``Reference`` as the last entry of the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": _pages(PACKAGE, files, config)})
    return files


def _pages(package: Path, files: Files, config: MkDocsConfig) -> list[Any]:
    """Pages of a package and of what it holds, as an entry of the navigation."""
    name = _name(package)
    inside = sorted(path for path in package.iterdir() if _is_public(path))
    lines = [f"---\ntitle: {name}\n---\n", f"::: {name}\n    options: {{members: false}}\n", "| module | |\n|---|---|"]
    nav: list[Any] = [f"reference/{name}/index.md"]
    for path in inside:
        short = path.stem
        if path.is_dir():
            lines.append(f"| [`{short}`](../{name}.{short}/index.md) | {_summary(path / '__init__.py')} |")
            nav.append({short: _pages(path, files, config)})
        else:
            page = f"reference/{name}/{short}.md"
            lines.append(f"| [`{short}`]({short}.md) | {_summary(path)} |")
            files.append(File.generated(config, page, content=f"::: {name}.{short}\n"))
            nav.append({short: page})
    files.append(File.generated(config, nav[0], content="\n".join(lines) + "\n"))
    return nav


def _name(path: Path) -> str:
    """Where a file or folder of the package is imported from."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def _is_public(path: Path) -> bool:
    if path.name.startswith(("_", ".")):
        return False
    return (path / "__init__.py").is_file() if path.is_dir() else path.suffix == ".py"


def _summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line of a table."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
