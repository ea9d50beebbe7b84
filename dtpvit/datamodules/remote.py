"""Shards on other machines, read as one stream that survives what passes: a lost connection, a busy server.

A connection that breaks is opened again after a pause and goes on at the byte where it broke, so that whoever reads
sees the same bytes in the same order, and an exact resume stays exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import blake2b
from time import sleep
from typing import Any

from webdataset.gopen import gopen

__all__ = ["RemoteStream"]

RETRIES = 5
"""Attempts to open an address again, over its whole length, after the first."""

_PAUSE, _LONGEST = 1.0, 30.0  # seconds before the first further attempt, doubling; and at most
_BLOCK = 1 << 24  # bytes that object stores and HTTP servers are asked for at a time
_TIMEOUT = 60.0  # seconds of silence
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)
_PASSING = (408, 425, 429)  # of HTTP's refusals: timeout, too early, too many requests
_logger = logging.getLogger(__name__)


class RemoteStream:
    """The bytes of an address or of a ``pipe:`` command, from the first on.

    Addresses are opened by fsspec (``https://``, ``s3://``, ``gs://``, ``hf://``); where the package for their kind is
    not installed, by webdataset, through the kind's own command (aws, gsutil). What says no for good (not found, not
    allowed) is not asked again. A command is run again from its beginning, and must give the same bytes.

    Args:
        address: As ``named_shards`` gives it, not a local path.

    Raises:
        OSError: Here and on reading, if the address does not answer in all attempts.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._position = 0
        self._failures = 0
        self._without_ranges = False
        self._stream: Any = None
        self._again(self._open)

    def read(self, size: int, /) -> bytes:
        """The next ``size`` bytes, fewer only at the end."""
        data = self._again(lambda: self._read(size))
        self._position += len(data)
        return data

    def tell(self) -> int:
        """How many bytes were read."""
        return self._position

    def close(self) -> None:
        """Let go of the connection; whether it ended well does not matter any more."""
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                stream.close()
        except Exception as error:
            _logger.debug("closing %s: %s", self.address, error)

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        stream = self._stream if self._stream is not None else self._open()
        data = _read_all_of(stream, size)
        if len(data) < size and self.address.startswith("pipe:"):
            stream.close()  # raises if the command failed, which it may tell only now
        return data

    def _open(self) -> Any:
        """Open where it broke; what was read before is read past if it cannot be sought, in a command for instance."""
        self._stream = stream = _opened(self.address, 0 if self._without_ranges else _BLOCK)
        if self._position and _sought(stream, self._position):
            return stream
        for start in range(0, self._position, _BLOCK):
            wanted = min(_BLOCK, self._position - start)
            if len(_read_all_of(stream, wanted)) < wanted:
                raise OSError(f"it is shorter than before: {self._position} bytes had been read")
        return stream

    def _again(self, act: Callable[[], Any]) -> Any:
        """What ``act`` gives, after as many attempts as it needs and there are left."""
        while True:
            try:
                return act()
            except Exception as error:  # aiohttp, botocore and gcsfs each have exceptions of their own
                self.close()
                if not self._without_ranges and "support range requests" in str(error):
                    self._without_ranges = True  # a plain web server, which has to be read in one go
                    continue
                if _is_final(error):
                    raise
                self._failures += 1
                if self._failures > RETRIES:
                    said = str(error) or type(error).__name__
                    raise OSError(f"gave up after {self._failures} attempts ({said})") from error
                pause = _pause(self.address, self._failures)
                _logger.info("%s: %s; attempt %d in %.1f s", self.address, error, self._failures + 1, pause)
                sleep(pause)


def _opened(address: str, block: int) -> Any:
    if address.startswith("pipe:"):
        return gopen(address, "rb")
    from fsspec.core import url_to_fs  # with what it imports in turn, only where something is far away

    options: dict[str, Any] = {}
    if address.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(sock_connect=_TIMEOUT, sock_read=_TIMEOUT)}
    try:
        system, path = url_to_fs(address, **options)
    except ImportError:
        return gopen(address, "rb")
    return system.open(path, "rb", block_size=block)


def _read_all_of(stream: Any, size: int) -> bytes:
    """So many bytes, fewer only at the end: a plain web server's stream gives what has arrived."""
    data = stream.read(size)
    while data and len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            break
        data += more
    return data


def _sought(stream: Any, position: int) -> bool:
    try:
        shorter = stream.size is not None and stream.size < position
        if not shorter:
            stream.seek(position)
    except (AttributeError, ValueError, OSError):
        return False
    if shorter:
        raise OSError(f"it is shorter than before: {stream.size} bytes where {position} had been read")
    return True


def _is_final(error: Exception) -> bool:
    """Whether to ask again is in vain. fsspec calls whatever an HTTP server answers, or does not, "not found"."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith(("aiohttp", "asyncio", "builtins")):
        status = getattr(cause, "status", None if cause is not None else 404)
        return status is not None and 400 <= status < 500 and status not in _PASSING
    return isinstance(error, _FINAL)


def _pause(address: str, failure: int) -> float:
    """Seconds, doubling; up to half of them less by the address, so that workers do not all knock at once."""
    share = blake2b(f"{address} {failure}".encode(), digest_size=1).digest()[0] / 255
    return min(_LONGEST, _PAUSE * 2 ** (failure - 1)) * (1 - share / 2)
