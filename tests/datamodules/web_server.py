"""A web server on this machine that answers as the Web does: well, not at all, late, or half."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """``answer(handler, path, number)`` answers the n-th GET of a path, from 1 on; with ``ranges`` also HEADs, as 0."""

    daemon_threads = True

    def __init__(self, answer: Callable, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = ranges
        self.answer, self.requests, self.lock = answer, Counter(), threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that has gone is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests[self.path] += 1
            number = self.server.requests[self.path]
        self.server.answer(self, self.path, number)

    def do_HEAD(self) -> None:
        if self.server.ranges:
            self.server.answer(self, self.path, 0)
        else:
            self.send_error(501)

    def give(self, data: bytes, kind: str = "image/jpeg", status: int = 200, stop: int | None = None) -> None:
        """Send ``data``, or the range asked for; having promised all of it, stop after ``stop`` bytes."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        total = len(data)
        if asked and self.server.ranges and status == 200:
            status, data = 206, data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(status)
        if status == 206 and asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(data) - 1}/{total}")
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:stop])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(answer: Callable, ranges: bool = True) -> Iterator[Server]:
    server = Server(answer, ranges)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
