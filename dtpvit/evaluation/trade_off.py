"""Rows of a comparison as a table on the screen, in files, and as curves of quality against cost."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = ["MARKS", "ComparedResult", "draw", "markdown_table", "pareto_front", "shown", "write"]

MARKS = "os^vDPX*"
"""What tells one series from another beside its colour."""


@dataclass(frozen=True)
class ComparedResult:
    """What one row of a comparison came to.

    Attributes:
        series: As of :class:`dtpvit.evaluation.compared_rows.ComparedRow`.
        setting: Likewise.
        top1: Share of images whose first class is right; None without labels.
        top5: Share of images with the right class among the first five; likewise.
        change: Top-1 against the dense model.
        error: Standard error of ``change``, over images in pairs.
        agreement: Share of images with the dense model's first class; None for features.
        divergence: Mean distance of the output from the dense model's: nats, or 1 - cosine of features.
        gmacs: Of an image, the decision included, mean.
        decision: Share of it that finds what to keep or merge, in GMACs.
        tokens: Of an image behind the last block, prefix included, mean.
        speed_up: Over the dense model, forward pass, median over rounds; None if not measured.
        images_per_second: From the median time; likewise.
        efficiency: Speed-up over the ratio of GMACs.
    """

    series: str
    setting: str
    top1: float | None
    top5: float | None
    change: float | None
    error: float | None
    agreement: float | None
    divergence: float
    gmacs: float
    decision: float
    tokens: float
    speed_up: float | None
    images_per_second: float | None
    efficiency: float | None


def shown(results: Sequence[ComparedResult]) -> Table:
    """A table for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles, rows = _columns(results)
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _columns(results: Sequence[ComparedResult]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, without the columns that nobody fills."""
    titles = ["", "top-1, %", "top-5, %", "against dense", "same class, %", "divergence"]
    titles += ["GMACs", "decision", "tokens", "images/s", "speed-up", "efficiency"]
    rows = [_cells(result) for result in results]
    used = [place for place in range(len(titles)) if place == 0 or any(row[place] for row in rows)]
    return [titles[place] for place in used], [[row[place] for place in used] for row in rows]


def _cells(result: ComparedResult) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    change = "" if not result.error else f"{100 * (result.change or 0):+.1f} ± {100 * result.error:.1f}"
    name = f"{result.series}, {result.setting}" if result.setting else result.series
    measured = [result.images_per_second, result.speed_up, result.efficiency]
    speed = ["" if value is None else f"{value:.{digits}f}" for value, digits in zip(measured, (1, 2, 2), strict=True)]
    cost = [f"{result.gmacs:.3f}", f"{result.decision:.3f}", f"{result.tokens:.1f}"]
    accuracy = [share(result.top1), share(result.top5), change, share(result.agreement), f"{result.divergence:.3f}"]
    return [name, *accuracy, *cost, *speed]


def write(results: Sequence[ComparedResult], about: Mapping[str, Any], folder: Path) -> None:
    """Write ``comparison.csv``, ``comparison.md``, and ``comparison.json`` with what was run, on what and when."""
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ComparedResult)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    titles, rows = _columns(results)
    (folder / "comparison.md").write_text(markdown_table(titles, rows), encoding="utf-8")
    record = {**about, "rows": [asdict(result) for result in results]}
    (folder / "comparison.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """A table in Markdown, whose cells are Markdown themselves; columns other than ``words`` are aligned right."""
    aligned = ["---" if place in words else "---:" for place in range(len(titles))]
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, aligned, *rows)]
    return "\n".join(lines) + "\n"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, quality) is such that no other has at most its cost and at least its quality.

    >>> pareto_front([(1.0, 70.0), (2.0, 80.0), (2.5, 75.0)])
    [True, True, False]
    """
    return [
        not any(other[0] <= cost and other[1] >= quality and other != (cost, quality) for other in points)
        for cost, quality in points
    ]


def draw(results: Sequence[ComparedResult], paths: Sequence[Path]) -> None:
    """Draw quality against GMACs and, where it was measured, against the measured speed-up.

    Args:
        results: Of which those of one series are joined.
        paths: Pictures to write, of the format of their endings.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    timed = any(result.speed_up for result in results)
    figure = Figure(figsize=(11 if timed else 6.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2 if timed else 1, squeeze=False, sharey=True)[0]
    labelled = results[0].top1 is not None
    for axes, kind in zip(panels, ("gmacs", "speed_up"), strict=False):
        for number, series in enumerate(dict.fromkeys(result.series for result in results)):
            rows = [row for row in results if row.series == series and getattr(row, kind) is not None]
            rows.sort(key=lambda row: getattr(row, kind))
            height = [100 * row.top1 if row.top1 is not None else row.divergence for row in rows]
            mark = {"marker": MARKS[number % len(MARKS)], "markersize": 5, "linewidth": 1.4}
            axes.plot([getattr(row, kind) for row in rows], height, color=f"C{number % 10}", label=series, **mark)
        axes.set_xlabel("GMACs an image" if kind == "gmacs" else "measured speed-up over dense")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1, %" if labelled else "divergence from the dense model")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for path in paths:
        figure.savefig(path, dpi=130)
