"""Drawings in rows and columns with a title over each column and a caption under each, as PNG or as SVG."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dtpvit.evaluation.segment_pictures import Drawing, font, heat_colours
from dtpvit.output_file import write_picture, write_text

__all__ = ["Panel", "data_address", "embedded", "jpeg", "sheet_image", "write_sheet"]

SIDE, PATCH = 400, 20  # pixels of a panel's longer side and of a patch, at least
GAP, MARGIN, LINE = 20, 24, 26
LETTERS = 20
LEAST = 360  # pixels of a column, so that captions do not meet


@dataclass(frozen=True)
class Panel:
    """A drawing and what is written under it.

    Attributes:
        drawing: What is shown.
        caption: One line.
        scale: What the ends of a heat map's colours stand for; None for other drawings.
    """

    drawing: Drawing
    caption: str
    scale: tuple[str, str] | None = None

    @property
    def zoom(self) -> int:
        """Pixels for each pixel of the photograph."""
        patch = min(self.drawing.patch)
        return max(1, math.ceil(SIDE / max(self.drawing.photo.shape[:2])), math.ceil(PATCH / patch))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the sheet, in pixels."""
        height, width = self.drawing.photo.shape[:2]
        return self.zoom * width, self.zoom * height


@dataclass(frozen=True)
class _Sheet:
    """Where everything lies on a sheet, in pixels."""

    titles: list[tuple[int, int, str]]
    panels: list[tuple[int, int, Panel]]
    size: tuple[int, int]

    @classmethod
    def of(cls, titles: Sequence[str], rows: Sequence[Sequence[Panel]]) -> _Sheet:
        widths = [max(LEAST, *(row[column].size[0] for row in rows)) for column in range(len(titles))]
        lefts = [MARGIN + sum(widths[:column]) + column * GAP for column in range(len(titles))]
        lines = [
            textwrap.wrap(title, int(width / (0.56 * LETTERS))) for title, width in zip(titles, widths, strict=True)
        ]
        head = max(map(len, lines))
        written = [
            (left, MARGIN + (head - len(text) + number) * LINE, line)
            for left, text in zip(lefts, lines, strict=True)
            for number, line in enumerate(text)
        ]
        placed, top = list[tuple[int, int, Panel]](), MARGIN + head * LINE + 6
        for row in rows:
            placed += [(left, top, panel) for left, panel in zip(lefts, row, strict=True)]
            top += max(panel.size[1] for panel in row) + LINE + GAP
        return cls(written, placed, (lefts[-1] + widths[-1] + MARGIN, top - GAP + MARGIN))


def write_sheet(path: Path, titles: Sequence[str], rows: Sequence[Sequence[Panel]]) -> None:
    """Write a sheet, as PNG, JPEG or SVG by the path's ending.

    Args:
        path: The file.
        titles: One a column.
        rows: Each of as many panels.
    """
    if path.suffix.lower() == ".svg":
        write_text(path, _as_svg(_Sheet.of(titles, rows)))
    else:
        write_picture(path, sheet_image(titles, rows))


def jpeg(pixels: np.ndarray) -> bytes:
    """An image, uint8, shape (H, W, 3), as JPEG; of a photograph that is a fifth of PNG."""
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "JPEG", quality=92, subsampling=0)
    return held.getvalue()


def data_address(content: bytes) -> str:
    """A JPEG as the text of a ``data:`` address."""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def embedded(pixels: np.ndarray) -> str:
    """An image as the text of a ``data:`` address."""
    return data_address(jpeg(pixels))


def sheet_image(titles: Sequence[str], rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """A sheet as pixels; see :func:`write_sheet`."""
    sheet = _Sheet.of(titles, rows)
    image = Image.new("RGB", sheet.size, "white")
    pen, letters, small = ImageDraw.Draw(image), font(LETTERS), font(LETTERS - 3)
    for left, top, line in sheet.titles:
        pen.text((left, top), line, fill="black", font=letters)
    for left, top, panel in sheet.panels:
        image.paste(Image.fromarray(panel.drawing.pixels(panel.zoom)), (left, top))
        below = top + panel.size[1] + 6
        if panel.scale is not None:
            low, high = panel.scale
            start = left + round(small.getlength(low)) + 6
            image.paste(Image.fromarray(_ramp()), (start, below + 2))
            pen.text((left, below), low, fill="#333", font=small)
            pen.text((start + 106, below), high, fill="#333", font=small)
        else:
            pen.text((left, below), panel.caption, fill="#333", font=small)
    return image


def _as_svg(sheet: _Sheet) -> str:
    width, height = sheet.size
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for left, top, line in sheet.titles:
        parts.append(f'<text x="{left}" y="{top + LETTERS}" font-size="{LETTERS}">{escape(line)}</text>')
    for left, top, panel in sheet.panels:
        high, wide = panel.drawing.photo.shape[:2]
        photo = f'<image width="{wide}" height="{high}" href="{embedded(panel.drawing.photo)}"/>'
        parts.append(f'<g transform="translate({left} {top}) scale({panel.zoom})">{photo}{panel.drawing.svg()}</g>')
        below = top + panel.size[1] + LINE - 4
        text = panel.caption
        if panel.scale is not None:
            text, high_end = panel.scale
            start = left + round(0.62 * (LETTERS - 3) * len(text)) + 8  # no sans-serif font has wider digits
            parts.append(f'<image x="{start}" y="{below - 12}" width="100" height="12" href="{embedded(_ramp())}"/>')
            style = f'font-size="{LETTERS - 3}" fill="#333"'
            parts.append(f'<text x="{start + 106}" y="{below}" {style}>{escape(high_end)}</text>')
        parts.append(f'<text x="{left}" y="{below}" font-size="{LETTERS - 3}" fill="#333">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _ramp() -> np.ndarray:
    """The colours of a heat map from low to high, uint8, shape (12, 100, 3)."""
    return heat_colours(np.linspace(0, 1, 100))[None].repeat(12, axis=0)
