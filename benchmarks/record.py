"""How a result is written down: what was run, on what, when, and what came out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from dtpvit.evaluation.measuring import machine, versions

__all__ = ["heading", "pages", "table"]


def heading(title: str, device: torch.device) -> str:
    """Title, command, machine, versions and date of a result page, in Markdown."""
    name = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    packages = ", ".join(f"{package} {number}" for package, number in versions().items())
    return f"# {title}\n\n```\n{command}\n```\n\n{machine(device)}; {packages}; {date.today().isoformat()}.\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first to the right, for numbers, except those of more than three words."""
    wordy = [any(len(str(row[column]).split()) > 3 for row in rows) for column in range(len(header))]
    bars = ["---" if left else "---:" for left in [True, *wordy[1:]]]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(bars) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def pages(parts: Sequence[str], output: str | None) -> None:
    """Print the parts, and write them to ``output`` if one is given; what stands there below a line ``<!-- notes -->``
    is kept, so that a new run does not lose what people wrote about the last one."""
    text = "\n".join(parts)
    print(text)
    if output is None:
        return
    path, mark = Path(output), "<!-- notes -->"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    notes = f"\n{mark}{old.split(mark, 1)[1]}" if mark in old else ""
    path.write_text(text + notes, encoding="utf-8")
