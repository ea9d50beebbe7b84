"""``dtpvit data show``: a look at the data, images and captions as training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from heapq import nsmallest
from pathlib import PurePath
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dtpvit.datamodules.samples import RawSample, SkippedSample, captions_of, decode_image, raw_sample, sample_seed
from dtpvit.datamodules.shards import expand_shards
from dtpvit.datamodules.tars import Fault, scan_shard
from dtpvit.errors import UserError
from dtpvit.output_file import output_file, write_picture

__all__ = ["draw_sheet", "show"]

_COLUMNS, _SIDE, _MARGIN = 8, 200, 8
_LINES, _LINE, _FONT = 5, 14, 11  # of text under an image, the last line being the key
_LETTERS = 400  # of a caption, more than fit
_INK, _GREY, _RED = (30, 30, 30), (120, 120, 120), (180, 30, 30)
_PAPER, _GROUND = (255, 255, 255), (225, 225, 225)
_MOST = 1000


class _Cell(NamedTuple):
    where: str
    raw: RawSample


def show(shards: list[str], out: str = "sheet.png", count: int = 48, seed: int = 0) -> None:
    """Draw a contact sheet: images with their captions, keys and sizes, drawn at random from all shards.

    The same shards and seed give the same sheet. Where there are more shards than images, as many shards as images are
    read. An image that cannot be used is shown as the reason.

    Args:
        shards: Folders, brace lists or globs of shards.
        out: The picture to write.
        count: Images on the sheet.
        seed: Of the choice.

    Raises:
        UserError: If no sample is there, or the picture cannot be written.
    """
    target = output_file(out)
    assert target is not None
    if not 1 <= count <= _MOST:
        raise UserError(f"count is {count}; a sheet holds 1 to {_MOST} images.")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{out} does not end as a picture does: give a name such as sheet.png.")
    cells = _choose(expand_shards(shards), count, seed)
    if not cells:
        raise UserError(f"No sample of {' '.join(shards)} has an image and a caption; `dtpvit data check` says why.")
    write_picture(target, draw_sheet(cells))
    print(f"{len(cells)} samples are in {target}.")


def _choose(shards: list[str], count: int, seed: int) -> list[_Cell]:
    """Those samples whose hashes are least, in the order of the shards."""
    chosen = sorted(Random(seed).sample(range(len(shards)), min(count, len(shards))))
    samples = (
        cell for place in tqdm(chosen, unit="shard", leave=False, disable=None) for cell in _cells(shards[place])
    )
    least = nsmallest(count, enumerate(samples), key=lambda item: (sample_seed(item[1].where, 0, seed), item[0]))
    return [cell for _, cell in sorted(least, key=lambda item: item[0])]


def _cells(shard: str) -> Iterator[_Cell]:
    for found in scan_shard(shard):
        if isinstance(found, Fault):
            continue
        key, parts = found
        try:
            raw = raw_sample(key, parts | {"txt": b"class " + parts["cls"]} if "cls" in parts else parts)
        except SkippedSample:
            continue
        yield _Cell(f"{PurePath(shard).name}: {key}", raw)


def draw_sheet(cells: list[_Cell]) -> Image.Image:
    """The picture."""
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width, height = _SIDE + _MARGIN, _SIDE + _LINES * _LINE + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        _draw(sheet, cell, _MARGIN + column * width, _MARGIN + row * height)
    return sheet


def _draw(sheet: Image.Image, cell: _Cell, left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    write = partial(_write, draw, left)
    try:
        image = decode_image(cell.raw.image)
    except SkippedSample as skipped:
        draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill=_GROUND)
        write(top + _SIDE // 2, skipped.cause, _RED)
        size = ""
    else:
        size = f"  {image.width}x{image.height}"
        image.thumbnail((_SIDE, _SIDE))
        sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
    try:
        lines = _wrap(" ".join(captions_of(cell.raw)[0][:_LETTERS].split()))
    except SkippedSample as skipped:
        lines = [skipped.cause]
    for number, line in enumerate([*lines, f"{cell.where}{size}"]):
        write(top + _SIDE + number * _LINE, line, _INK if number < len(lines) else _GREY)


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, text: str, colour: tuple[int, int, int]) -> None:
    draw.text((left, top), _drawable(text), font=_font(), fill=colour)


def _wrap(text: str) -> list[str]:
    """At most as many lines as there is room for, the last with an ellipsis if the caption goes on."""
    lines, rest = list[str](), text
    while rest and len(lines) < _LINES - 1:
        fits = _fitting(rest)
        if fits < len(rest) and len(lines) == _LINES - 2:
            lines.append(rest[: max(1, fits - 1)].rstrip() + "…")
            break
        space = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else fits
        end = space if space > 0 else fits
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _fitting(text: str) -> int:
    """How many of the first letters fit into the width, one at least."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _font().getlength(_drawable(text[:middle])) <= _SIDE:
            low = middle
        else:
            high = middle - 1
    return low


def _drawable(text: str) -> str:
    """Half of a surrogate pair, which JSON may hold, is no letter; without FreeType PIL draws Latin-1 only."""
    coding = "utf-8" if isinstance(_font(), ImageFont.FreeTypeFont) else "latin-1"
    return text.encode(coding, "replace").decode(coding).replace("\0", " ")


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT)
