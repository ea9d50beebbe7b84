"""Reading tar archives of samples, front to back, fast, and without trusting them.

webdataset's own iterators stand on ``tarfile``, which costs five times as much per member and takes a damaged
header for the end of the archive. Here damage is always told apart from the end, and no archive, whatever sizes its
headers claim and however well it is compressed, makes its reader hold more than a sample of ``MOST_BYTES``.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

from dtpvit.datamodules.remote import RemoteStream
from dtpvit.datamodules.shards import is_local

__all__ = ["MOST_BYTES", "BrokenTar", "Fault", "index_members", "key_and_ending", "read_members", "scan_shard"]

MOST_BYTES = 256 << 20
"""A sample's members together; an uncompressed image as large as any that is decoded has as many."""

_BLOCK = 512
_LONGEST_END = 22 * _BLOCK  # two blocks of zeros, filled up to a record of twenty
_REGULAR = (b"0", b"\0")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders; some writers give them a size
_LONG_NAME, _PAX = b"L", b"x"
_LONGEST_HEADER = 1 << 20  # bytes of a long name or a pax header
_MOST_COMPRESSED = 200  # times that a .tar.gz may be larger inside; images have 1 to 3, deflate's limit is 1032
_LONGEST_DIGITS = 20
_MEMBER_COST = 200  # bytes that a member takes beside its content
_DAMAGE = (OSError, EOFError, ValueError, OverflowError, zlib.error)
_Content = TypeVar("_Content")


class BrokenTar(Exception):
    """The archive cannot be opened, or it is damaged from some point on.

    Attributes:
        within: The member whose content is damaged, if it is that; what came before is then known to be whole.
    """

    def __init__(self, message: str, within: str = "") -> None:
        super().__init__(message)
        self.within = within


class Fault(NamedTuple):
    """What is left out of a shard: "duplicate key" and the key, or "unreadable shard" and what is wrong with it."""

    cause: str
    where: str


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_members(shard: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every regular file of a tar (``.tar``, ``.tar.gz``, ``.tgz``), in order.

    Raises:
        BrokenTar: If the archive cannot be opened; after what came before, if it is cut off or damaged, a member is
            larger than ``MOST_BYTES``, or it is compressed as nothing but a bomb is.
    """
    try:
        with ExitStack() as stack:
            opened: Any = open(shard, "rb", buffering=1 << 20) if is_local(shard) else RemoteStream(shard)
            stream = stack.enter_context(opened)
            if shard.endswith("gz"):
                stream = _Inflated(stream, stack.enter_context(gzip.GzipFile(fileobj=stream)))
            yield from _members(stream, lambda size: _read_padded(stream, size))
    except (*_DAMAGE, ImportError, MemoryError) as error:
        raise BrokenTar(f"{shard}: {error}", getattr(error, "within", "")) from error


def index_members(shard: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every regular file of a local, uncompressed tar, in order, reading no content.

    Raises:
        BrokenTar: As ``read_members``, and if the tar is compressed.
    """
    try:
        with open(shard, "rb") as file:
            end = os.fstat(file.fileno()).st_size

            def pass_over(size: int) -> int:
                offset = file.tell()
                if offset + size + -size % _BLOCK > end:
                    raise ValueError("cut off")
                file.seek(size + -size % _BLOCK, os.SEEK_CUR)
                return offset

            for name, size, offset in _sized_members(file, pass_over):
                yield name, offset, size
    except _DAMAGE as error:
        raise BrokenTar(f"{shard}: {error}", getattr(error, "within", "")) from error


def scan_shard(shard: str) -> Iterator[tuple[str, dict[str, bytes]] | Fault]:
    """Key and members (by lower-case ending) of every sample, neighbours with one key being one; and what is wrong.

    Of members that occur twice the first counts. The sample at which damage begins is not yielded, for it may be
    incomplete; the one before is, if the damage is within a member that is not its own.
    """
    key, parts, seen, held = "", {}, set(), 0
    try:
        for name, data in read_members(shard):
            this, ending = key_and_ending(name)
            if not this:
                continue
            if this != key:
                if parts:
                    yield key, parts
                    seen.add(key)
                key, parts, held = this, {}, 0
            held += len(data) + _MEMBER_COST
            if held > MOST_BYTES:
                raise BrokenTar(f"{shard}: the sample {key[:100]} is larger than {MOST_BYTES >> 20} MiB")
            if this in seen or ending in parts:
                yield Fault("duplicate key", this)
            else:
                parts[ending] = data
    except BrokenTar as error:
        if parts and key_and_ending(error.within)[0] not in ("", key):
            yield key, parts
        yield Fault("unreadable shard", str(error))
        return
    if parts:
        yield key, parts


def key_and_ending(name: str) -> tuple[str, str]:
    """Which sample a member belongs to, and its lower-case ending; "" if it is none's.

    >>> key_and_ending("set/a.Seg.PNG")
    ('set/a', 'seg.png')
    """
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.lower().partition(".")
    if not stem or not ending or stem.startswith("__"):
        return "", ""
    return f"{folder}/{file[: len(stem)]}" if folder else file[: len(stem)], ending


def _members(stream: _Readable, take: Callable[[int], _Content]) -> Iterator[tuple[str, _Content]]:
    """Name of every regular file, and what ``take`` makes of its size, standing at its content."""
    return ((name, content) for name, _, content in _sized_members(stream, take))


def _sized_members(stream: _Readable, take: Callable[[int], _Content]) -> Iterator[tuple[str, int, _Content]]:
    override: dict[str, str] = {}
    while True:
        header = _read(stream, _BLOCK)
        if not header.strip(b"\0"):
            return _check_end(stream)
        size, kind = _checked_size(header), header[156:157]
        if kind in (_PAX, _LONG_NAME):
            body = _read_padded(stream, _bounded(size, _LONGEST_HEADER))
            override |= _pax(body) if kind == _PAX else {"path": _text(body)}
            continue
        size = 0 if kind in _WITHOUT_CONTENT else _bounded(int(override.get("size", size)), MOST_BYTES)
        name = override.get("path") or _name(header)
        try:
            content = take(size)
        except _DAMAGE as error:
            raise _DamagedContent(str(error), name) from error
        if kind in _REGULAR:
            yield name, size, content
        override = {}


def _check_end(stream: _Readable) -> None:
    """Whether the block of zeros that was read is the end: at most the rest of a record follows, and only zeros.

    A hole in a file, as a lost block of a disk or a broken download leaves, reads as zeros too.
    """
    rest = stream.read(_LONGEST_END)
    if rest.strip(b"\0"):
        raise ValueError("zeros where a member should begin, and more behind them")
    if _BLOCK + len(rest) > _LONGEST_END:
        raise ValueError("zeros where a member should begin, more than the end of a tar has")


class _DamagedContent(ValueError):
    def __init__(self, message: str, within: str) -> None:
        super().__init__(message)
        self.within = within


def _bounded(size: int, most: int) -> int:
    if not 0 <= size <= most:
        raise ValueError(f"a member claims {size} bytes, where at most {most} are read")
    return size


def _checked_size(header: bytes) -> int:
    """Bytes of the member, after the header's checksum was verified (its own field counts as blanks)."""
    if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise ValueError("damaged header")
    if header[124] & 0x80:  # GNU's binary form, for members of 8 GiB and more
        return int.from_bytes(header[125:136], "big")
    return _octal(header[124:136])


def _octal(field: bytes) -> int:
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError("damaged header")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:262] == b"ustar" and header[263:265] == b"00" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax(body: bytes) -> dict[str, str]:
    """Records ``<length> <key>=<value>\\n`` of a pax header; only path and size matter here."""
    records: dict[str, str] = {}
    start = 0
    while start < len(body):
        space = body.find(b" ", start, start + _LONGEST_DIGITS)
        digits = body[start : max(start, space)]
        length = int(digits) if digits.isdigit() else 0
        if length <= max(1, space - start):  # else what is read next would be the same again
            raise ValueError("damaged pax header")
        key, _, value = body[space + 1 : start + length - 1].partition(b"=")
        if key == b"size" and not value.isdigit():
            raise ValueError("damaged pax header")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "replace")
        start += length
    return records


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _read_padded(stream: _Readable, size: int) -> bytes:
    body = _read(stream, size)
    if padding := -size % _BLOCK:
        _read(stream, padding)
    return body


def _read(stream: _Readable, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ValueError("cut off")
    return data


class _Inflated:
    """The stream within a compressed one, as long as it is in proportion to what it came from."""

    def __init__(self, packed: Any, stream: gzip.GzipFile) -> None:
        self._packed, self._stream = packed, stream
        self._given = 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._given += len(data)
        if self._given > max(MOST_BYTES, _MOST_COMPRESSED * self._packed.tell()):
            raise ValueError(f"it is {_MOST_COMPRESSED} times as large as its compressed file")
        return data
