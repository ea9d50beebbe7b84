"""Valid files, spoilt: bytes, numbers and lengths changed, the checksums that would give it away made good again."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random

__all__ = [
    "Mutate",
    "spoil_bytes",
    "spoil_gzip",
    "spoil_headers",
    "spoil_image",
    "spoil_tar",
    "spoil_text",
    "spoil_zip",
]

Mutate = Callable[[Sequence[bytes], Random], bytes]
"""The seeds, of which one or two are taken, and what decides everything."""

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_VALUES = ["null", "true", "[]", "{}", '""', "-1", "0", "1e999", "9" * 5000, '"\\ud800"', '"\\u0000"', "NaN", "1e-400"]
_VALUES += ["[" * 100_000, "[" * 960 + "]" * 960, '{"a":' * 950 + "1" + "}" * 950, '"' + "x" * 100_000 + '"', '".."']
_VALUES += ['"/dev/zero"', '["a", 3]', '{"a": "b"}', '"\u202e\U0001f415"', "1.5", "[[[]]]", str(1 << 64), '"<image>"']
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')


def spoil_bytes(seeds: Sequence[bytes], random: Random) -> bytes:
    """One to eight changes of any kind."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        random.choice(_CHANGES)(data, random, seeds)
    return bytes(data)


def spoil_text(seeds: Sequence[bytes], random: Random) -> bytes:
    """JSON and YAML: half of the time a value becomes another, by a name and quotes the rest still fits."""
    if random.random() < 0.5:
        return spoil_bytes(seeds, random)
    data = random.choice(seeds)
    for _ in range(random.choice((1, 1, 2, 4))):
        tokens = list(_TOKEN.finditer(data))
        if not tokens:
            break
        start, end = random.choice(tokens).span()
        value = random.choice(_VALUES).encode("utf-8", "surrogatepass")
        if random.random() < 0.3:
            value = random.choice(tokens)[0]
        data = data[:start] + value + data[end:]
    return data


def spoil_tar(seeds: Sequence[bytes], random: Random) -> bytes:
    """A tar, three times in four with headers whose sums are right."""
    data = bytearray(spoil_bytes(seeds, random))
    if random.random() < 0.6 and len(data) >= 512:  # a change that only a header sees
        start = 512 * random.randrange(len(data) // 512)
        field, length = random.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155)))
        new = random.choice(
            (random.randbytes(length), b"7" * length, b"\x80" + b"\xff" * length, b"-1", b"0", b"xLgKS5")
        )
        data[start + field : start + field + length] = new[:length].ljust(length, b"\0")
    if random.random() < 0.75:
        for start in range(0, len(data) - 511, 512):
            header = data[start : start + 512]
            if header[148:156].strip(b"01234567\0 ") == b"" and header.strip(b"\0"):
                header[148:156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(data)


def spoil_gzip(seeds: Sequence[bytes], random: Random) -> bytes:
    """A tar spoilt and then compressed, or compressed and then spoilt; or a few bytes that are 400 MB of zeros."""
    if random.random() < 0.002:
        stream = io.BytesIO()
        with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=9) as file:
            file.write(random.choice(seeds)[: random.choice((512, 2048))])
            for _ in range(400):
                file.write(bytes(1 << 20))
        return stream.getvalue()
    if random.random() < 0.7:
        return gzip.compress(spoil_tar(seeds, random), 1)
    return spoil_bytes([gzip.compress(random.choice(seeds), 1)], random)


def spoil_image(seeds: Sequence[bytes], random: Random) -> bytes:
    """An image; a PNG three times in four with chunks whose sums are right, and at times with a bomb in one of them."""
    data = spoil_bytes(seeds, random)
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or random.random() < 0.25:
        return data
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        chunks.append((body[:4], body[4:]))
        place += 12 + length
    if random.random() < 0.01:
        bomb = zlib.compress(bytes(random.choice((1 << 20, 80 << 20))), 9)
        kind = random.choice(((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0"), (b"IDAT", b"")))
        chunks.insert(1, (kind[0], kind[1] + bomb))
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"".join([data[:8], *written])


def spoil_zip(seeds: Sequence[bytes], random: Random) -> bytes:
    """A zip as torch writes them, three times in four sound by its own sums, what is in it spoilt."""
    seed = random.choice(seeds)
    if random.random() < 0.25 or not zipfile.is_zipfile(io.BytesIO(seed)):
        return spoil_bytes([seed], random)
    stream = io.BytesIO()
    how = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(stream, "w", how) as new:
        names = old.namelist()
        spoilt = random.choice([name for name in names if name.endswith(".pkl")] + names)
        for name in names:
            content = old.read(name)
            if name == spoilt:
                content = spoil_bytes([content or b"\0"], random) if random.random() < 0.95 else bytes(100 << 20)
            if name != spoilt or random.random() < 0.9:
                new.writestr(name, content)
    return stream.getvalue()


def spoil_headers(seeds: Sequence[bytes], random: Random) -> bytes:
    """A zip, half of the time with one to three fields of its headers or of its directory changed and nothing else."""
    if random.random() < 0.5:
        return spoil_zip(seeds, random)
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 2, 3))):
        found = random.choice(list(_RECORD.finditer(data)))
        fields = _FIELDS[found[0]]
        start = found.start() + random.choice(fields)
        if random.random() < 0.5:
            data[start] ^= 1 << random.randrange(8)
        else:
            size = random.choice((2, 4))
            data[start : start + size] = (random.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)


_FIELDS = {b"PK\1\2": (6, 8, 9, 10, 16, 20, 24, 28, 30, 32, 34, 42), b"PK\3\4": (4, 6, 7, 8, 14, 18, 22, 26, 28)}
"""Where version, flags, compression, checksum, sizes, lengths and place stand in a zip's directory and headers."""
_FIELDS |= {b"PK\5\6": (4, 6, 8, 10, 12, 16, 20), b"PK\6\6": (4, 14, 16, 20, 24, 32, 40, 48), b"PK\6\7": (4, 8, 16)}
_RECORD = re.compile(b"|".join(_FIELDS))


def _flip(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _number(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    size = random.choice((1, 2, 4, 8))
    if len(data) >= size:
        start = random.randrange(len(data) - size + 1)
        value = random.choice(_NUMBERS) % (1 << 8 * size)
        data[start : start + size] = value.to_bytes(size, random.choice(("big", "little")))


def _digits(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    if found := list(re.finditer(rb"\d+", data)):
        start, end = random.choice(found).span()
        data[start:end] = random.choice((b"0", b"-1", b"9" * (end - start), b"7" * 11, b"99999999999", b"1e9", b""))


def _cut(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    del data[random.randrange(len(data) + 1) :]


def _delete(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    start = random.randrange(len(data) + 1)
    del data[start : start + random.choice((1, 2, 7, 64, 512, 4096))]


def _repeat(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    start = random.randrange(len(data) + 1)
    part = data[start : start + random.choice((1, 4, 32, 512, 2048))]
    data[start:start] = part * random.choice((1, 2, 16))


def _insert(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    start = random.randrange(len(data) + 1)
    data[start:start] = random.randbytes(random.choice((1, 2, 4, 16)))


def _splice(data: bytearray, random: Random, seeds: Sequence[bytes]) -> None:
    other = random.choice(seeds)
    data[random.randrange(len(data) + 1) :] = other[random.randrange(len(other) + 1) :]


_CHANGES = (_flip, _flip, _set, _number, _number, _digits, _cut, _delete, _repeat, _insert, _splice)
