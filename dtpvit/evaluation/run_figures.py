"""Curves of runs, and their quality against cost, as pictures of an HTML page and of a Markdown file.

Each panel is a picture of its own in the page, so that a narrow screen puts them below each other; one sheet for
Markdown. Colours are dark enough for white and light enough for a dark page, and differ to those who see no red or no
green; lines differ in mark and dash too. Whatever is no line has the colour of the page's letters.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from dtpvit.evaluation.run_record import Points
from dtpvit.evaluation.run_table import QUALITY, ComparedRun, RunGroup
from dtpvit.evaluation.trade_off import MARKS, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Panel", "inline_svg", "panels", "sheet_png", "swatch", "thinned"]

# The first four after Wong, "Points of view: Color blindness", Nature Methods 2011, the pink darkened.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c77cab", "#6f5fd6", "#6a6a6a")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)))
LETTERS = "#3b4048"  # stands for the colour of the page's letters
LIMIT = 300  # points of a line


@dataclass
class Panel:
    """A plot.

    Attributes:
        title: What it shows.
        horizontal: Title of the axis.
        vertical: Likewise.
        lines: Of each run its points; none for a plot of quality against cost.
        dots: Of each run its (cost, quality).
        names: Of each run.
        from_zero: Whether the vertical axis starts there.
    """

    title: str
    horizontal: str
    vertical: str
    lines: dict[int, Points] = field(default_factory=dict)
    dots: dict[int, tuple[float, float]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    from_zero: bool = False

    @property
    def dominated(self) -> list[str]:
        """Runs that another beats in quality at no higher cost."""
        front = pareto_front(list(self.dots.values()))
        return [self.names[number] for number, kept in zip(self.dots, front, strict=True) if not kept]

    @property
    def alt(self) -> str:
        """What is to be seen, in words."""
        if self.lines:
            told = [f"{self.names[run]} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for run, line in self.lines.items()]
        else:
            told = [f"{self.names[run]} {quality:.4g} at {cost:.4g}" for run, (cost, quality) in self.dots.items()]
            told += [f"dominated: {', '.join(self.dominated) or 'none'}"]
        return f"{self.title}, {self.vertical} against {self.horizontal}: {'; '.join(told)}."


def panels(group: RunGroup) -> list[Panel]:
    """The plots of a group for which at least one run has figures; of quality against cost, two runs."""
    quality = group.quality or "val/loss"
    found = [
        _curves(group, "Training loss", "loss", lambda run: _logged(run, "train/loss")),
        _curves(group, "Validation", QUALITY.get(quality, "loss"), lambda run: _logged(run, quality)),
        _curves(group, "Boundary rate", "tokens for each patch", _boundary_rate, from_zero=True),
        _curves(group, "Tokens in training", "an image", lambda run: _logged(run, "train/tokens"), from_zero=True),
    ]
    if group.quality is not None:
        gmacs = {run.number: run.gmacs[0] for run in group.runs}
        seconds = {run.number: run.record.mean("step_seconds") for run in group.runs}
        found.append(_trade_off(group, quality, "Quality against GMACs", "GMACs an image", gmacs))
        found.append(_trade_off(group, quality, "Quality against time", "seconds a training step, measured", seconds))
    return [panel for panel in found if panel.lines or len(panel.dots) > 1]


def _curves(
    group: RunGroup, title: str, vertical: str, points: Callable[[ComparedRun], Points], from_zero: bool = False
) -> Panel:
    lines = {run.number: line for run in group.runs if (line := thinned(points(run)))}
    names = {run.number: run.record.name for run in group.runs}
    return Panel(title, "optimizer step", vertical, lines=lines, names=names, from_zero=from_zero)


def _trade_off(group: RunGroup, metric: str, title: str, horizontal: str, costs: Mapping[int, float | None]) -> Panel:
    dots = dict[int, tuple[float, float]]()
    for run in group.runs:
        cost, reached = costs[run.number], run.record.last(metric)
        if cost is not None and reached is not None:
            dots[run.number] = (cost, 100 * reached)
    names = {run.number: run.record.name for run in group.runs}
    return Panel(title, horizontal, QUALITY[metric], dots=dots, names=names)


def _logged(run: ComparedRun, metric: str) -> Points:
    times = 100 if metric in QUALITY else 1
    return [(step, times * value) for step, value in run.record.curves.get(metric, [])]


def _boundary_rate(run: ComparedRun) -> Points:
    """Of all reducers together: the product over those that were logged at a step."""
    found = dict[int, float]()
    for name, points in run.record.curves.items():
        if name.startswith("train/boundary_rate/"):
            for step, rate in points:
                found[step] = found.get(step, 1.0) * rate
    return sorted(found.items())


def thinned(points: Points) -> Points:
    """At most ``LIMIT`` points, each the mean of as many neighbours, at the last one's step.

    >>> thinned([(step, float(step)) for step in range(600)])[:2]
    [(1, 0.5), (3, 2.5)]
    """
    size = -(-len(points) // LIMIT) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def inline_svg(panel: Panel, key: str) -> str:
    """The panel as an ``svg`` element to be put into a page; ``key`` keeps its ids apart from other elements'.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = _figure((4.3, 3.0))
    _draw(figure.subplots(), panel)
    return _element(figure, key)


def swatch(number: int, key: str) -> str:
    """Line and mark of a run, as an ``svg`` element."""
    figure = _figure((0.45, 0.17), layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **_style(number))
    axes.set_xlim(0, 2)
    return _element(figure, key)


def sheet_png(group: Sequence[Panel], names: dict[int, str]) -> bytes:
    """All panels on white, side by side, over one legend, as PNG."""
    columns = min(2, len(group))
    rows = -(-len(group) // columns)
    figure = _figure((4.6 * columns, 3.1 * rows + 0.25 * len(names) + 0.2))
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(group) :]:
        axes.axis("off")
    for axes, panel in zip(places, group, strict=False):
        _draw(axes, panel)
    handles = [axes_line for number in names for axes_line in places[0].plot([], [], **_style(number))]
    legend = figure.legend(handles, [str(number) for number in names], loc="outside lower left", frameon=False)
    for text, name in zip(legend.get_texts(), names.values(), strict=True):
        text.set_parse_math(False)  # a name is a name, whatever characters it is made of
        text.set_text(name if len(name) <= 90 else f"{name[:60]}…{name[-29:]}")
    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # drawn as a box
        figure.savefig(held, format="png", dpi=110, metadata={"Software": None})
    return held.getvalue()


def _figure(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout=layout)


def _style(number: int) -> dict[str, Any]:
    colour = COLOURS[number % len(COLOURS)]
    mark = {"marker": MARKS[number % len(MARKS)], "markersize": 5}
    return {"color": colour, "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.5, **mark}


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, line in panel.lines.items():
        marked = max(1, len(line) // 6)
        axes.plot([step for step, _ in line], [value for _, value in line], markevery=marked, **_style(number))
    front = pareto_front(list(panel.dots.values()))
    best = sorted(dot for dot, kept in zip(panel.dots.values(), front, strict=True) if kept)
    for (left, low), (right, high) in pairwise(best):
        axes.plot([left, right, right], [low, low, high], color=LETTERS, linewidth=1, linestyle=":", zorder=1)
    for (number, (cost, quality)), kept in zip(panel.dots.items(), front, strict=True):
        filled = {} if kept else {"markerfacecolor": "none"}
        axes.plot([cost], [quality], **{**_style(number), "markersize": 9, "linestyle": "none", **filled})
    axes.margins(0.08)
    if panel.from_zero:
        axes.set_ylim(0, 1.15 * max(value for line in panel.lines.values() for _, value in line) or 1)
    axes.set_title(panel.title, fontsize=11, color=LETTERS, loc="left")
    axes.set_xlabel(panel.horizontal, color=LETTERS)
    axes.set_ylabel(panel.vertical, color=LETTERS)
    axes.tick_params(colors=LETTERS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LETTERS)
    axes.grid(alpha=0.15, color=LETTERS)
    if panel.lines:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _element(figure: Figure, key: str) -> str:
    """Letters stay letters, in the page's colour; nothing is left that names an address."""
    import matplotlib

    held = io.StringIO()
    nobody = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(held, format="svg", transparent=True, metadata=nobody)
    svg = held.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href").replace(LETTERS, "currentColor")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
