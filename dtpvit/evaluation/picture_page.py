"""Drawings at several compressions as one HTML page with a slider, which needs nothing but a browser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from dtpvit.evaluation.picture_sheet import Panel, embedded
from dtpvit.evaluation.segment_pictures import Drawing, heat_colours
from dtpvit.output_file import write_text

__all__ = ["SlidingPanel", "write_page"]


@dataclass(frozen=True)
class SlidingPanel:
    """A place on the page.

    Attributes:
        title: Over it.
        stops: What it shows at each position of the slider, or one panel for all of them.
    """

    title: str
    stops: Sequence[Panel]


def write_page(
    path: Path, heading: str, about: str, stops: Sequence[str], images: Sequence[Sequence[SlidingPanel]], start: int
) -> None:
    """Write a page that loads nothing from anywhere.

    Args:
        path: The file.
        heading: Title of the page.
        about: How it was made.
        stops: Names of the positions of the slider.
        images: For each image its panels, side by side or, on a narrow screen, below each other.
        start: Position at which the slider starts.
    """
    # Every photograph once, however many drawings lie over it.
    photos = {
        (photo := panel.drawing.photo).tobytes(): photo for row in images for place in row for panel in place.stops
    }
    numbers = {content: number for number, content in enumerate(photos)}
    held = [
        f'<symbol id="photo{number}" viewBox="0 0 {photo.shape[1]} {photo.shape[0]}">'
        f'<image width="{photo.shape[1]}" height="{photo.shape[0]}" href="{embedded(photo)}"/></symbol>'
        for number, photo in enumerate(photos.values())
    ]
    marks = "".join(f"<span>{escape(stop)}</span>" for stop in stops)
    rows = "\n".join(f'<section class="image">{_row(panels, numbers, start)}</section>' for panels in images)
    parts = {"HEADING": escape(heading), "ABOUT": escape(about), "MARKS": marks, "LAST": str(len(stops) - 1)}
    parts |= {"START": str(start), "RAMP": _ramp(), "PHOTOS": "".join(held), "ROWS": rows}
    # In one pass: these words may stand in a name, and some of them in the letters of a photograph.
    write_text(path, re.sub("|".join(parts), lambda found: parts[found[0]], _PAGE))


def _row(panels: Sequence[SlidingPanel], numbers: dict[bytes, int], start: int) -> str:
    parts = list[str]()
    for place in panels:
        parts.append(f"<figure><h2>{escape(place.title)}</h2>")
        for number, panel in enumerate(place.stops):
            fixed = len(place.stops) == 1
            state = "" if fixed else f' data-stop="{number}"' + ("" if number == start else " hidden")
            parts.append(f"<div{state}>{_drawn(panel.drawing, numbers)}{_caption(panel)}</div>")
        parts.append("</figure>")
    return "".join(parts)


def _drawn(drawing: Drawing, numbers: dict[bytes, int]) -> str:
    height, width = drawing.photo.shape[:2]
    photo = f'<use href="#photo{numbers[drawing.photo.tobytes()]}" width="{width}" height="{height}"/>'
    return f'<svg viewBox="0 0 {width} {height}" role="img">{photo}{drawing.svg()}</svg>'


def _caption(panel: Panel) -> str:
    if panel.scale is None:
        return f"<figcaption>{escape(panel.caption) or '&nbsp;'}</figcaption>"
    low, high = map(escape, panel.scale)
    return f'<figcaption>{low} <span class="ramp"></span> {high}</figcaption>'


def _ramp() -> str:
    return ",".join("#" + "".join(f"{value:02x}" for value in row) for row in heat_colours(np.linspace(0, 1, 9)))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>HEADING</title>
<style>
body { margin: 0 auto; max-width: 1600px; padding: 1rem; font: 16px/1.4 system-ui, sans-serif }
body { color: #222; background: #fff }
h1 { font-size: 1.3rem; margin: 0 }
h2 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere }
code { font-size: .85rem; color: #555; overflow-wrap: anywhere }
form { position: sticky; top: 0; background: #fffe; padding: .7rem 0; z-index: 1 }
label { display: block; max-width: 40rem }
input { width: 100%; margin: .3rem 0 0 }
.marks { display: flex; justify-content: space-between; font-size: .85rem; color: #555 }
.image { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 0 1rem; margin: 0 0 2rem }
figure { margin: 0 0 1rem; max-width: 448px; display: grid; grid-template-rows: subgrid; grid-row: span 2 }
h2 { align-self: end }
@media (max-width: 500px) { .image { grid-template-columns: 1fr 1fr } h2, figcaption { font-size: .8rem } }
svg { display: block; width: 100% }
figcaption { font-size: .9rem; color: #333; padding-top: .2rem }
.ramp { display: inline-block; width: 6rem; height: .8em; vertical-align: middle }
.ramp { background: linear-gradient(to right, RAMP) }
[hidden] { display: none }
</style>
<h1>HEADING</h1>
<code>ABOUT</code>
<form><label>Compression: patches for each token
<input id="compression" type="range" min="0" max="LAST" step="1" value="START" autocomplete="off">
<span class="marks">MARKS</span></label></form>
<svg width="0" height="0" style="display:none" aria-hidden="true"><defs>PHOTOS</defs></svg>
ROWS
<script>
const slider = document.getElementById("compression");
slider.addEventListener("input", () => {
  for (const part of document.querySelectorAll("[data-stop]")) part.hidden = part.dataset.stop !== slider.value;
});
</script>
</html>
"""
