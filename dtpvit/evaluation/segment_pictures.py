"""An image with what became of its patches drawn over it, as pixels or as SVG.

Shape letters: H, W pixels, R, C rows and columns of patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dtpvit.evaluation.seen_segments import SeenSegments

__all__ = [
    "Drawing",
    "Style",
    "draw_heat",
    "draw_histogram",
    "draw_segments",
    "font",
    "heat_colours",
    "segment_colours",
]

Style = Literal["colour", "mean"]

# Hues far from each other first, each with a light and a dark relative behind them, for segments with many neighbours.
PALETTE = np.array(
    [
        *[(31, 119, 220), (240, 70, 60), (40, 165, 70), (250, 200, 30), (150, 70, 200), (255, 130, 20), (20, 190, 200)],
        *[(235, 90, 170), (150, 195, 250), (255, 175, 165), (160, 225, 160), (110, 60, 20), (205, 175, 240)],
        *[(15, 60, 130), (130, 15, 25), (10, 85, 45), (115, 105, 0), (0, 95, 105), (130, 20, 90), (190, 230, 40)],
    ],
    dtype=np.uint8,
)
FEW = 8  # colours used as long as they suffice
TINT, DARK, HEAT = 0.45, 0.8, 0.85  # how much of the photograph colours, drops and heat cover
HEATS = np.array([(0, 0, 4), (60, 15, 110), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)], float)


@dataclass(frozen=True)
class Drawing:
    """A photograph, a colour over each patch, lines between segments, and numbers in them.

    Attributes:
        photo: uint8, shape (H, W, 3).
        fill: Colour over each patch, uint8, shape (R, C, 3).
        opacity: Of that colour, 0 to 1, shape (R, C).
        source: Outlines run between patches where it differs, shape (R, C); None for no outlines.
        labels: Row and column, in patches, and what is written there.
    """

    photo: np.ndarray
    fill: np.ndarray
    opacity: np.ndarray
    source: np.ndarray | None = None
    labels: list[tuple[float, float, str]] = field(default_factory=list)

    @classmethod
    def of_photo(cls, photo: np.ndarray) -> Drawing:
        """The photograph alone."""
        return cls(photo, np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1)))

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.photo.shape[0] // self.opacity.shape[0], self.photo.shape[1] // self.opacity.shape[1]

    def pixels(self, scale: int = 1) -> np.ndarray:
        """uint8, shape (scale * H, scale * W, 3); outlines are two pixels wide, whatever the scale."""
        size = self.photo.shape[1] * scale, self.photo.shape[0] * scale
        photo = np.asarray(Image.fromarray(self.photo).resize(size, Image.Resampling.BICUBIC), dtype=float)
        height, width = (side * scale for side in self.patch)
        fill, opacity = (values.repeat(height, 0).repeat(width, 1) for values in (self.fill, self.opacity[..., None]))
        drawn = np.rint(photo * (1 - opacity) + fill * opacity).astype(np.uint8)
        if self.source is not None:
            drawn[_outlined(self.source.repeat(height, 0).repeat(width, 1))] = 255
        if not self.labels:
            return drawn
        image = Image.fromarray(drawn)
        pen, written = ImageDraw.Draw(image), font(self._letters(scale * min(self.patch)))
        for row, column, text in self.labels:
            pen.text(
                (column * width, row * height),
                text,
                fill="white",
                font=written,
                anchor="mm",
                stroke_width=2,
                stroke_fill="black",
            )
        return np.asarray(image)

    def svg(self) -> str:
        """What lies over the photograph, as SVG elements in pixels of the photograph."""
        height, width = self.patch
        paths: dict[str, list[str]] = {}
        for row in range(self.opacity.shape[0]):
            for start, stop in self._runs(row):
                colour = "#" + "".join(f"{value:02x}" for value in self.fill[row, start])
                style = f'fill="{colour}" fill-opacity="{self.opacity[row, start]:.3g}"'
                place = f"M{start * width} {row * height}h{(stop - start) * width}v{height}H{start * width}z"
                paths.setdefault(style, []).append(place)
        parts = [f'<path {style} d="{"".join(places)}"/>' for style, places in paths.items()]
        parts = [f'<g shape-rendering="crispEdges">{"".join(parts)}</g>'] if parts else []
        if edges := self._edges():
            thick = max(self.photo.shape[:2]) / 220
            parts.append(f'<path fill="none" stroke="#fff" stroke-width="{thick:.2f}" d="{edges}"/>')
        style = 'fill="#fff" stroke="#000" paint-order="stroke" text-anchor="middle" dominant-baseline="central"'
        size = self._letters(2 * min(self.patch)) / 2
        texts = [
            f'<text x="{column * width:g}" y="{row * height:g}">{text}</text>' for row, column, text in self.labels
        ]
        if texts:
            parts.append(f'<g {style} font-size="{size:g}" stroke-width="{size / 5:g}">{"".join(texts)}</g>')
        return "".join(parts)

    @staticmethod
    def _letters(patch: int) -> int:
        """Height of letters on a patch of so many pixels."""
        return max(8, min(18, round(0.55 * patch)))

    def _runs(self, row: int) -> list[tuple[int, int]]:
        """First and last column, the latter not included, of neighbours of one colour."""
        key = [(*colour, opaque) for colour, opaque in zip(self.fill[row], self.opacity[row], strict=True)]
        starts = [at for at in range(len(key)) if at == 0 or key[at] != key[at - 1]]
        ends = [*starts[1:], len(key)]
        return [(start, stop) for start, stop in zip(starts, ends, strict=True) if self.opacity[row, start] > 0]

    def _edges(self) -> str:
        """Lines between patches of different segments, as the data of an SVG path."""
        if self.source is None:
            return ""
        height, width = self.patch
        down = np.argwhere(self.source[1:] != self.source[:-1])
        across = np.argwhere(self.source[:, 1:] != self.source[:, :-1])
        flat = [f"M{column * width} {(row + 1) * height}h{width}" for row, column in down]
        upright = [f"M{(column + 1) * width} {row * height}v{height}" for row, column in across]
        return "".join(flat + upright)


def draw_segments(photo: np.ndarray, seen: SeenSegments, *, style: Style = "colour", sizes: bool = False) -> Drawing:
    """The patches of each token in one colour, outlined; dropped ones darkened.

    Args:
        photo: uint8, shape (H, W, 3).
        seen: Which patches belong together.
        style: ``"colour"``: neighbours in different colours, which the photograph shines through; ``"mean"``: every
            segment in its mean colour, opaque: what is left of the image.
        sizes: Write its number of patches into every segment of at least two.
    """
    source = seen.source
    if style == "mean":
        fill, opacity = _mean_colours(photo, source), np.ones(source.shape)
    else:
        fill, opacity = PALETTE[segment_colours(source).clip(0)], np.full(source.shape, TINT)
    gone = source < 0
    fill, opacity = np.where(gone[..., None], np.uint8(0), fill), np.where(gone, DARK, opacity)
    return Drawing(photo, fill, opacity, source, _sizes(source) if sizes else [])


def draw_heat(photo: np.ndarray, seen: SeenSegments) -> tuple[Drawing, tuple[float, float]]:
    """The heat map, and the values at the ends of its scale: 0 and 1 for a probability, else those of the image.

    Raises:
        ValueError: If there is none.
    """
    if seen.heat is None:
        raise ValueError("no reducer of this encoder has a heat map")
    known = seen.heat[np.isfinite(seen.heat)]
    low, high = (0.0, 1.0) if seen.heat_of.endswith("probability") else (float(known.min()), float(known.max()))
    fill = heat_colours((seen.heat - low) / max(high - low, 1e-12))
    opacity = np.where(np.isfinite(seen.heat), HEAT, DARK)
    return Drawing(photo, fill, opacity), (low, high)


def draw_histogram(values: np.ndarray, shape: tuple[int, int]) -> Drawing:
    """How often values occur between the lowest and the highest, on white of the given height and width in pixels.

    Whole numbers get a bar each as long as there is room.
    """
    height, width = shape
    low, high = float(values.min()), float(values.max())
    bars = 32
    if np.issubdtype(values.dtype, np.integer) and high - low < bars:
        low, high, bars = low - 0.5, high + 0.5, int(high - low) + 1
    counts = np.histogram(values, bars, (low, high))[0]
    tall = np.rint(counts / counts.max() * 0.95 * height).astype(int)
    bar = (np.arange(width) * bars // width).clip(max=bars - 1)
    filled = np.arange(height)[::-1, None] < tall[bar]
    filled[-1] = True
    return Drawing.of_photo(np.where(filled[..., None], PALETTE[0], np.uint8(255)))


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Dark to bright for 0 to 1, black for NaN, uint8, shape (..., 3)."""
    place = np.nan_to_num(values, nan=0.0).clip(0, 1) * (len(HEATS) - 1)
    mixed = [np.interp(place, np.arange(len(HEATS)), HEATS[:, channel]) for channel in range(3)]
    return np.where(np.isnan(values)[..., None], 0, np.rint(np.stack(mixed, axis=-1))).astype(np.uint8)


def segment_colours(source: np.ndarray) -> np.ndarray:
    """A number for each patch such that segments that touch, corners included, differ while the palette lasts.

    Greedy, in the order of the segments' first patches, and of the colours that are free the one used least; the same
    for the same segments.

    Args:
        source: Segment of each patch, -1 for none, shape (R, C).

    Returns:
        Row of the palette, -1 where there is no segment, shape (R, C).
    """
    rows, columns = source.shape
    touching: dict[int, set[int]] = {int(segment): set() for segment in source.flat if segment >= 0}
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        first = source[: rows - down, max(0, -across) : columns - max(0, across)]
        second = source[down:, max(0, across) : columns + min(0, across)]
        for one, other in zip(first.flat, second.flat, strict=True):
            if one != other and one >= 0 and other >= 0:
                touching[int(one)].add(int(other))
                touching[int(other)].add(int(one))
    colour: dict[int, int] = {}
    used = [0] * len(PALETTE)
    for segment, neighbours in touching.items():
        taken = {colour[other] for other in neighbours if other in colour}
        free = [number for number in range(len(PALETTE)) if number not in taken]
        few = [number for number in free if number < FEW] or free[:1] or list(range(len(PALETTE)))
        colour[segment] = min(few, key=lambda number: used[number])
        used[colour[segment]] += 1
    return np.array([colour.get(int(segment), -1) for segment in source.flat]).reshape(source.shape)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


def _outlined(source: np.ndarray) -> np.ndarray:
    """Whether each pixel lies on one side of a change of segment, bool, shape (H, W)."""
    found = np.zeros(source.shape, bool)
    down, across = source[1:] != source[:-1], source[:, 1:] != source[:, :-1]
    found[1:] |= down
    found[:-1] |= down
    found[:, 1:] |= across
    found[:, :-1] |= across
    return found


def _mean_colours(photo: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Of each patch's segment, uint8, shape (R, C, 3)."""
    rows, columns = source.shape
    patches = photo.reshape(rows, photo.shape[0] // rows, columns, -1, 3).mean(axis=(1, 3)).reshape(-1, 3)
    place = source.reshape(-1) + 1
    count = np.bincount(place).clip(min=1)
    means = np.stack([np.bincount(place, patches[:, channel]) / count for channel in range(3)], axis=1)
    return np.rint(means[place]).astype(np.uint8).reshape(rows, columns, 3)


def _sizes(source: np.ndarray) -> list[tuple[float, float, str]]:
    """The size of each segment of at least two patches, at its centre, or on the patch of it nearest to that."""
    found = list[tuple[float, float, str]]()
    for segment in np.unique(source[source >= 0]):
        places = np.argwhere(source == segment)
        if len(places) > 1:
            row, column = places.mean(0) + 0.5
            if source[int(row), int(column)] != segment:
                row, column = places[((places + 0.5 - (row, column)) ** 2).sum(1).argmin()] + 0.5
            found.append((float(row), float(column), str(len(places))))
    return found
