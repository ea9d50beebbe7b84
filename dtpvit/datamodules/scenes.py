"""Small captioned scenes of coloured shapes, each a function of its seed alone."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["CLASSES", "COLOURS", "HELD_OUT", "SEEN", "SHAPES", "Placed", "Scene", "describe", "draw_scene"]

Floats = NDArray[np.floating[Any]]
Points = list[tuple[float, float]]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 38, 44),
    "orange": (244, 128, 28),
    "yellow": (250, 212, 46),
    "green": (40, 152, 70),
    "blue": (36, 92, 214),
    "purple": (126, 56, 178),
    "white": (246, 246, 244),
    "black": (26, 26, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
CLASSES = [(colour, shape) for shape in SHAPES for colour in COLOURS]
# A diagonal through the table of pairs and three more: every shape and every colour loses one or two pairs.
HELD_OUT = [
    (colour, shape)
    for s, shape in enumerate(SHAPES)
    for c, colour in enumerate(COLOURS)
    if c == (3 * s + 1) % 8 or (s, c) in ((0, 4), (3, 7), (6, 1))
]
SEEN = [pair for pair in CLASSES if pair not in HELD_OUT]

_RADII = {
    "small": (0.165, 0.185),
    "medium": (0.23, 0.26),
    "large": (0.31, 0.36),
}  # shares of the image's side
_GROUNDS = ("plain", "shaded", "striped", "dotted", "checked", "cloudy", "grainy")
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Placed:
    """A shape in a scene; centre and radius are shares of the image's side, y pointing down."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """An RGB image, what is in it, and what a person might write under it."""

    image: Image.Image
    shapes: list[Placed]
    ground: str
    caption: str


def draw_scene(seed: str, size: int, pairs: Sequence[tuple[str, str]], *, max_shapes: int = 3) -> Scene:
    """A scene of ``size`` x ``size`` pixels: one to ``max_shapes`` of the ``pairs`` (colour, shape)."""
    draw = Random(seed)
    noise = np.random.RandomState(draw.getrandbits(32))  # its stream never changes between NumPy versions
    shapes = _place(draw, pairs, max_shapes)
    ground = draw.choice(_GROUNDS)
    canvas = _ground(ground, _palette(draw, shapes), size, draw, noise)
    for placed in shapes:
        canvas = _paint(canvas, placed, draw)
    pixels = (canvas * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return Scene(Image.fromarray(pixels), shapes, ground, describe(shapes, ground, draw))


def describe(shapes: Sequence[Placed], ground: str, draw: Random) -> str:
    """One of many true captions."""
    pairs = {(placed.colour, placed.shape) for placed in shapes}
    if len(shapes) > 1 and len(pairs) == 1:
        number = ("two", "three")[len(shapes) - 2]
        text = f"{number} {shapes[0].colour} {_plural(shapes[0].shape)}"
    elif len(shapes) == 1:
        text = _name(shapes[0], draw)
    elif len(shapes) == 2 or draw.random() < 0.3:
        first, second = draw.sample(list(shapes), 2)
        link = _relation(first, second) if draw.random() < 0.75 else "and"
        text = f"{_name(first, draw)} {link} {_name(second, draw)}"
    else:
        names = [_name(placed, draw) for placed in draw.sample(list(shapes), len(shapes))]
        text = f"{', '.join(names[:-1])} and {names[-1]}"
    if draw.random() < 0.25:
        text = f"{text} on a {ground} background"
    return draw.choice(("{}", "{}", "{}", "a photo of {}", "a picture of {}", "an image with {}")).format(text)


def _name(placed: Placed, draw: Random) -> str:
    words = [placed.colour, placed.shape]
    if placed.size != "medium" and draw.random() < 0.65:
        words.insert(0, placed.size)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _relation(first: Placed, second: Placed) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > 1.3 * abs(dx):
        return "above" if dy > 0 else "below"
    if abs(dx) > 1.3 * abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "next to"


def _place(draw: Random, pairs: Sequence[tuple[str, str]], max_shapes: int) -> list[Placed]:
    """Shapes that do not touch each other or the edge; fewer than wanted where there is no room."""
    wanted = draw.choice([number for number in (1, 1, 1, 2, 2, 3) if number <= max_shapes])
    repeated = draw.choice(pairs) if wanted > 1 and draw.random() < 0.15 else None
    placed: list[Placed] = []
    for _ in range(wanted):
        colour, shape = repeated or draw.choice(pairs)
        large = any(other.size == "large" for other in placed)
        size = draw.choice(("small", "medium") if large and wanted == 3 else tuple(_RADII))
        radius = draw.uniform(*_RADII[size])
        edge = 1.15 * radius + 0.02
        for _ in range(30):
            x, y = draw.uniform(edge, 1 - edge), draw.uniform(edge, 1 - edge)
            if all(math.hypot(x - o.x, y - o.y) > 1.1 * (radius + o.radius) + 0.03 for o in placed):
                placed.append(Placed(colour, shape, size, x, y, radius))
                break
    return placed


def _palette(draw: Random, shapes: Sequence[Placed]) -> tuple[Floats, Floats]:
    """Two muted colours from which the shapes stand off: the first good pair, or the best of twenty."""
    best, best_distance = None, -1.0
    inks = np.array([COLOURS[placed.colour] for placed in shapes]) / 255
    for _ in range(20):
        hue, light = draw.random(), draw.uniform(0.34, 0.76)
        other = min(0.82, max(0.28, light + draw.choice((-1, 1)) * draw.uniform(0.06, 0.13)))
        pair = [
            colorsys.hls_to_rgb(hue, light, draw.uniform(0.08, 0.30)),
            colorsys.hls_to_rgb((hue + draw.uniform(-0.08, 0.08)) % 1, other, draw.uniform(0.08, 0.30)),
        ]
        colours = np.array(pair, dtype=np.float32)
        distance = float(np.linalg.norm(inks[:, None] - colours[None], axis=2).min())
        if distance > best_distance:
            best, best_distance = (colours[0], colours[1]), distance
        if distance > 0.42:
            break
    assert best is not None
    return best


def _ground(kind: str, palette: tuple[Floats, Floats], size: int, draw: Random, noise: np.random.RandomState) -> Floats:
    """A textured ground, float (size, size, 3) in 0..1."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle, phase = draw.uniform(0, math.pi), draw.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    waves = 2 * math.pi * draw.uniform(4, 8)
    if kind == "plain":
        mix = np.full_like(x, 0.5)
    elif kind == "shaded":
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "striped":
        mix = 0.5 + 0.5 * np.tanh(3 * np.sin(waves * along + phase))
    elif kind == "dotted":
        mix = 0.5 + 0.5 * np.tanh(3 * (np.cos(waves * along + phase) + np.cos(waves * across) - 0.9))
    elif kind == "checked":
        mix = 0.5 + 0.5 * np.tanh(6 * np.sin(waves * 0.6 * along + phase) * np.sin(waves * 0.6 * across))
    else:
        cells = draw.randint(4, 6) if kind == "cloudy" else size // 3
        mix = _smooth_noise(noise, cells, size)
    grain = noise.normal(0, 0.012, (size, size, 1)).astype(np.float32)
    mix = mix[..., None].astype(np.float32)
    return palette[0] * (1 - mix) + palette[1] * mix + grain


def _smooth_noise(noise: np.random.RandomState, cells: int, size: int) -> Floats:
    """Random values on a coarse lattice, bicubically enlarged, float (size, size) in 0..1."""
    lattice = Image.fromarray(noise.randint(0, 256, (cells, cells)).astype(np.uint8))
    return np.asarray(lattice.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _paint(canvas: Floats, placed: Placed, draw: Random) -> Floats:
    """The canvas with a shape on it: soft shadow, light from the top left, antialiased edge."""
    size = canvas.shape[0]
    mask_image = _mask(placed, size, draw)
    mask = np.asarray(mask_image, dtype=np.float32)[..., None] / 255
    soft = mask_image.filter(ImageFilter.GaussianBlur(0.022 * size))
    reach = max(1, round(0.018 * size))
    shadow = np.zeros_like(mask)
    shadow[reach:, reach:, 0] = np.asarray(soft, dtype=np.float32)[:-reach, :-reach] / 255
    canvas = canvas * (1 - 0.38 * shadow)
    ink = np.array(COLOURS[placed.colour], dtype=np.float32) / 255
    ink = ink + np.array([draw.uniform(-0.035, 0.035) for _ in range(3)], dtype=np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    light = ((placed.x - x) + (placed.y - y)) / (2 * placed.radius)  # 1 at the top left, -1 at the bottom right
    return canvas * (1 - mask) + (ink * (1 + 0.09 * light[..., None])) * mask


def _mask(placed: Placed, size: int, draw: Random) -> Image.Image:
    """Coverage of each pixel by the shape, 8-bit (size, size)."""
    big = size * _SUPERSAMPLING
    image = Image.new("L", (big, big))
    pen = ImageDraw.Draw(image)
    turn = math.radians(draw.uniform(-14, 14))
    sine, cosine = math.sin(turn), math.cos(turn)
    for points, fill in _outlines(placed.shape):
        scaled = [
            (
                (placed.x + placed.radius * (px * cosine - py * sine)) * big,
                (placed.y + placed.radius * (px * sine + py * cosine)) * big,
            )
            for px, py in points
        ]
        pen.polygon(scaled, fill=fill)
    return image.reduce(_SUPERSAMPLING)


def _outlines(shape: str) -> list[tuple[Points, int]]:
    """Polygons about the origin, of radius about one, painted in turn with full or no coverage."""
    if shape == "square":
        return [([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)], 255)]
    if shape == "triangle":
        return [([(1.2 * px, 1.2 * py + 0.22) for px, py in _arc(3)], 255)]
    if shape == "star":
        outer, inner = _arc(5, 1.15), _arc(5, 0.5, math.pi / 5)
        return [([point for pair in zip(outer, inner, strict=True) for point in pair], 255)]
    if shape == "cross":
        a, b = 1.0, 0.34
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
        return [(corners + [(-px, -py) for px, py in corners], 255)]
    if shape == "ring":
        return [(_arc(72, 1.05), 255), (_arc(72, 0.58), 0)]
    if shape == "heart":
        turns = [2 * math.pi * step / 72 for step in range(72)]
        return [([_heart(turn) for turn in turns], 255)]
    if shape == "moon":
        bite = [(0.88 * px + 0.52, 0.88 * py - 0.1) for px, py in _arc(72)]
        return [(_arc(72, 1.08), 255), (bite, 0)]
    return [(_arc(72), 255)]


def _arc(corners: int, radius: float = 1.0, turn: float = 0.0) -> Points:
    """Corners of a regular polygon, the first one at the top."""
    steps = [2 * math.pi * step / corners + turn for step in range(corners)]
    return [(radius * math.sin(step), -radius * math.cos(step)) for step in steps]


def _heart(turn: float) -> tuple[float, float]:
    x = math.sin(turn) ** 3
    y = (13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)) / 16
    return 1.1 * x, -1.1 * y - 0.12
