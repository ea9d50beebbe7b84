"""Images as the Web has them: odd ones, of which it is known what they show, and ones that nobody can use."""

import io
import struct
import zlib

from PIL import Image
from shard_files import jpeg

RED, BLUE = (250, 10, 10), (10, 10, 250)


def encoded(image, form, **save) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **save)
    return stream.getvalue()


def picture(size=(48, 32)) -> Image.Image:
    """Left red, right blue."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG's."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def header(width: int, height: int, depth: int = 8, colours: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))


def turned(orientation: int) -> bytes:
    """The picture as a camera stores it that was held so, and says so."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture() if orientation == 1 else picture().transpose(undo[orientation])
    return encoded(stored, "JPEG", quality=95, exif=exif)


def palette(**save) -> bytes:
    return encoded(picture().quantize(8), "PNG", **save)


def deep(picture: Image.Image) -> bytes:
    """16 bits a channel, which Pillow cannot write."""
    rows = b"".join(
        b"\0" + b"".join(bytes([v, v]) for x in range(picture.width) for v in picture.getpixel((x, y)))
        for y in range(picture.height)
    )
    return png(header(*picture.size, 16), chunk(b"IDAT", zlib.compress(rows)))


def see_through() -> Image.Image:
    """Left red, right blue but invisible."""
    image = picture().convert("RGBA")
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (0, 0, image.width // 2, image.height))
    image.putalpha(alpha)
    return image


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (48, 32), (0, 255, 0))], "duration": 40}
INVISIBLE = (255, 255, 255)

ODD = {
    "PNG with alpha": (encoded(see_through(), "PNG"), RED, INVISIBLE),
    "PNG of 16 bits": (deep(picture()), RED, BLUE),
    "PNG of 16 bits, grey": (
        encoded(Image.new("I;16", (48, 32), 40_000), "PNG"),
        (156, 156, 156),
        (156, 156, 156),
    ),
    "CMYK JPEG": (encoded(picture().convert("CMYK"), "JPEG", quality=95), RED, BLUE),
    "grey JPEG": (encoded(Image.new("L", (48, 32), 99), "JPEG", quality=95), (99, 99, 99), (99, 99, 99)),
    "palette": (palette(), RED, BLUE),
    "palette with transparency": (
        palette(transparency=picture().quantize(8).getpixel((40, 5))),
        RED,
        INVISIBLE,
    ),
    "GIF with transparency": (encoded(see_through(), "GIF"), RED, INVISIBLE),
    "animated GIF": (encoded(picture(), "GIF", **FRAMES), RED, BLUE),
    "animated PNG": (encoded(picture(), "PNG", **FRAMES), RED, BLUE),
    "animated WebP": (encoded(picture(), "WEBP", lossless=True, **FRAMES), RED, BLUE),
    "broken EXIF": (encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0broken"), RED, BLUE),
    "JPEG with a film behind it": (encoded(picture(), "JPEG", quality=95) + b"\xff\xda\0" * 500, RED, BLUE),
    "a line of 60,000 pixels": (encoded(Image.new("RGB", (1, 60_000), RED), "PNG"), RED, RED),
    "a line of 80,000,000 pixels": (encoded(Image.new("1", (80_000_000, 1), 1), "PNG"), INVISIBLE, INVISIBLE),
}
"""Name -> file, and the colours of its left and right."""

TINY = encoded(Image.new("RGB", (1, 1), RED), "PNG")

_whole = jpeg(0, (200, 200), quality=95)
_steps = encoded(picture((64, 48)), "JPEG", progressive=True)
_first, _second = [place for place in range(len(_steps)) if _steps.startswith(b"\xff\xda", place)][:2]

BAD = {
    "truncated JPEG": (_whole[:-900], "broken image"),
    "cut in its header": (_whole[:150], "broken image"),
    "truncated PNG": (encoded(picture((200, 200)), "PNG")[:-60], "broken image"),
    "HTML saved as .jpg": (b"<!DOCTYPE html><html><title>404 Not Found</title></html>", "broken image"),
    "20,000 by 20,000 pixels": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "oversized image"),
    "claims 2,000,000,000 by 2,000,000,000": (png(header(2_000_000_000, 2_000_000_000)), "oversized image"),
    "12,000 by 10,000 pixels, of which Pillow only warns": (png(header(12_000, 10_000)), "oversized image"),
    "JPEG of 65,500 by 65,500": (
        _whole.replace(struct.pack(">HH", 200, 200), struct.pack(">HH", 65_500, 65_500), 1),
        "oversized image",
    ),
    "a bomb in a text chunk": (
        png(header(8, 8), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300 << 20), 9))),
        "broken image",
    ),
    "a thousand scans": (_steps[:_first] + _steps[_first:_second] * 1000 + _steps[_second:], "broken image"),
    "a thousand scans, behind an end in a comment": (
        _steps[:2] + b"\xff\xfe\0\x04\xff\xd9" + _steps[2:_first] + _steps[_first:_second] * 1000 + _steps[_second:],
        "broken image",
    ),
}
"""Name -> file, and the cause it is counted under."""
