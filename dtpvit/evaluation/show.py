"""``dtpvit show``: the regions of an image that pooled tokens stand for, side by side across reducers and orders."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtpvit.datamodules.real_images import real_images
from dtpvit.encoder import ImageEncoder, VisionEncoder
from dtpvit.encoder.ops.scan import ORDERS
from dtpvit.errors import UserError
from dtpvit.evaluation.compression_rates import set_compression
from dtpvit.evaluation.picture_page import SlidingPanel, write_page
from dtpvit.evaluation.picture_sheet import Panel, write_sheet
from dtpvit.evaluation.seen_segments import SeenSegments, seen_segments
from dtpvit.evaluation.segment_pictures import Drawing, Style, draw_heat, draw_segments
from dtpvit.evaluation.shown_towers import shown_towers
from dtpvit.evaluation.towers import Tower
from dtpvit.interop.preprocessing import eval_transform, normalised
from dtpvit.output_file import output_file

__all__ = ["heat_panel", "segments_panel", "show"]

COMPRESSIONS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
ENDINGS = (".png", ".jpg", ".svg", ".html")


def show(
    images: list[str],
    checkpoint: list[str] | None = None,
    model: str | None = None,
    init: str | None = None,
    reducers: list[str] | None = None,
    orders: str | None = None,
    style: Style = "colour",
    sizes: bool = False,
    image_size: tuple[int, int] | None = None,
    crop_pct: float = 1.0,
    limit: int = 4,
    out: str = "segments.png",
) -> None:
    """Draw over images which patches became one token, and how likely a boundary was where that was learned.

    A row an image, a column a checkpoint, reducer or order. An .html file is one page with a slider over compressions,
    at which the same reducers are run again.

    Args:
        images: Image files, folders of images, or shards.
        checkpoint: Checkpoints of any task, exported folders, or names and configs, whose weights are random.
        model: timm's name of a Vision Transformer, or open_clip's of a CLIP with one, for --reducers.
        init: Its weights: a file, or a tag; what timm or open_clip download where it is left out.
        reducers: YAML files, such as configs/reducers/tome.yaml, each a column.
        orders: Draw everything in each of these orders of the patches: raster,serpentine,hilbert.
        style: colour: neighbouring segments in different colours; mean: each in its mean colour.
        sizes: Write into each segment how many patches it has.
        image_size: Height and width in pixels to which encoder and images are brought, the position embedding
            resampled; those of the encoder if left out.
        crop_pct: Share of the short side that the crop keeps.
        limit: At most so many images of each folder or set of shards.
        out: The file to write, .png, .jpg, .svg or .html; photographs are smallest as .jpg.
    """
    target = _target(out)
    towers = shown_towers(checkpoint or [], model, init, reducers or [])
    subjects = _in_orders([_Subject.of(tower) for tower in towers], orders)
    if limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1")
    for subject in subjects:
        subject.resize(image_size)
    photos = [_photos(subject, images, crop_pct, limit) for subject in subjects]
    if target.suffix.lower() == ".html":
        _write_page(target, subjects, photos, style, sizes)
    else:
        found = [subject.look(pixels) for subject, pixels in zip(subjects, photos, strict=True)]
        titles, rows = _columns(subjects, photos, found, style, sizes)
        write_sheet(target, titles, rows)
    print(f"dtpvit: wrote {target}: {len(photos[0])} images, {', '.join(subject.name for subject in subjects)}")


@dataclass(frozen=True)
class _Subject:
    """An encoder to be looked at."""

    name: str
    trunk: ImageEncoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str = "shortest"
    order: str | None = None

    @classmethod
    def of(cls, tower: Tower) -> _Subject:
        assert tower.trunk is not None
        return cls(tower.name, tower.trunk, tower.mean, tower.std, tower.resize_mode)

    def look(self, pixels: Tensor) -> list[SeenSegments]:
        """uint8 images, shape (B, 3, H, W), to what became of their patches."""
        if self.order is not None:
            for reducer in _ordered(self.trunk):
                reducer.order = self.order
        return seen_segments(self.trunk, normalised(pixels, self.mean, self.std))

    def resize(self, size: tuple[int, int] | None) -> None:
        """Bring the encoder to images of that height and width."""
        if size is None or tuple(self.trunk.image_size) == tuple(size):
            return
        if not isinstance(self.trunk, VisionEncoder):
            raise UserError(f"{self.name} takes images of {self.trunk.image_size} pixels only; leave --image-size out")
        try:
            self.trunk.set_input_size(size)
        except ValueError as error:
            raise UserError(f"{self.name} cannot take --image-size {size}: {error}") from error

    def compressed(self, compression: float) -> tuple[_Subject, bool]:
        """A copy at another compression, and whether it has a rate that can be set."""
        twin = replace(self, trunk=copy.deepcopy(self.trunk))
        return twin, set_compression(twin.trunk, compression)


def _target(out: str) -> Path:
    if Path(out).suffix.lower() not in ENDINGS:
        raise UserError(f"the picture is to be {out!r}; expected a file that ends in {', '.join(ENDINGS)}")
    path = output_file(out)
    assert path is not None
    return path


def _in_orders(subjects: Sequence[_Subject], orders: str | None) -> list[_Subject]:
    """Each subject once in every order; those that have none stay as they are."""
    wanted = [order.strip() for order in (orders or "").split(",") if order.strip()]
    if unknown := [order for order in wanted if order not in ORDERS]:
        raise UserError(f"--orders names {unknown[0]!r}; expected some of {','.join(ORDERS)}")
    if not wanted:
        return list(subjects)
    if not any(_ordered(subject.trunk) for subject in subjects):
        raise UserError("no reducer here reads patches in an order; leave --orders out")
    return [
        replace(subject, name=f"{subject.name}, {order}", order=order) if _ordered(subject.trunk) else subject
        for subject in subjects
        for order in (wanted if _ordered(subject.trunk) else wanted[:1])
    ]


def _ordered(trunk: ImageEncoder) -> list[Any]:
    """Reducers that read the patches as a line."""
    return [reducer for reducer in trunk.reducers.values() if isinstance(getattr(reducer, "order", None), str)]


def _photos(subject: _Subject, sources: Sequence[str], crop_pct: float, limit: int) -> Tensor:
    """uint8, shape (B, 3, H, W), as the encoder takes them."""
    height, width = subject.trunk.image_size
    transform = eval_transform((height, width), resize_mode=subject.resize_mode, crop_pct=crop_pct)
    return torch.cat([real_images(source, limit, transform, least=1)[0] for source in sources])


def _arrays(pixels: Tensor) -> list[np.ndarray]:
    return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def segments_panel(photo: np.ndarray, seen: SeenSegments, style: Style = "colour", sizes: bool = False) -> Panel:
    """Segments over a photograph, uint8, shape (H, W, 3), with the count of tokens below."""
    caption = f"{seen.tokens} token{'s' * (seen.tokens != 1)} of {seen.source.size} patches, {seen.compression:.1f}x"
    if dropped := int((seen.source < 0).sum()):
        caption += f", {dropped} dropped"
    return Panel(draw_segments(photo, seen, style=style, sizes=sizes), caption)


def heat_panel(photo: np.ndarray, seen: SeenSegments) -> Panel:
    """The heat map over a photograph, uint8, shape (H, W, 3), with its scale below."""
    drawing, (low, high) = draw_heat(photo, seen)
    return Panel(drawing, seen.heat_of, (f"{low:.3g}", f"{high:.3g}"))


def _columns(
    subjects: Sequence[_Subject],
    photos: Sequence[Tensor],
    found: Sequence[Sequence[SeenSegments]],
    style: Style,
    sizes: bool,
) -> tuple[list[str], list[list[Panel]]]:
    """Titles and rows of panels: the image, then for each subject its heat map, if it has one, and its segments."""
    titles, columns = ["image"], [[Panel(Drawing.of_photo(photo), "") for photo in _arrays(photos[0])]]
    for subject, pixels, seen in zip(subjects, photos, found, strict=True):
        pairs = list(zip(_arrays(pixels), seen, strict=True))
        if seen[0].heat is not None:
            titles.append(f"{subject.name}: {seen[0].heat_of}")
            columns.append([heat_panel(photo, one) for photo, one in pairs])
        titles.append(subject.name)
        columns.append([segments_panel(photo, one, style, sizes) for photo, one in pairs])
    return titles, [list(row) for row in zip(*columns, strict=True)]


def _write_page(
    target: Path, subjects: Sequence[_Subject], photos: Sequence[Tensor], style: Style, sizes: bool
) -> None:
    """Every subject as it is and at each compression, where it has a rate."""
    images = [[SlidingPanel("image", [Panel(Drawing.of_photo(photo), "")])] for photo in _arrays(photos[0])]
    for subject, pixels in zip(subjects, photos, strict=True):
        arrays = _arrays(pixels)
        looks = [subject.look(pixels)]
        for compression in COMPRESSIONS:
            twin, movable = subject.compressed(compression)
            looks.append(twin.look(pixels) if movable else looks[0])
        for number, photo in enumerate(arrays):
            if looks[0][number].heat is not None:
                stops = [heat_panel(photo, look[number]) for look in looks]
                images[number].append(SlidingPanel(f"{subject.name}: {looks[0][number].heat_of}", stops))
            stops = [segments_panel(photo, look[number], style, sizes) for look in looks]
            images[number].append(SlidingPanel(subject.name, stops))
    marks = ["own", *(f"{compression:g}x" for compression in COMPRESSIONS)]
    about = shlex.join(["dtpvit", *sys.argv[1:]])
    write_page(target, "Segments behind pooled tokens", about, marks, images, 0)
