"""A picture server that does everything wrong, on loopback: one path for each misbehaviour.

What is uploaded to it is read, and answered in the same ways.

A misbehaviour is a generator of what is sent; a number is a pause in seconds.
"""

import contextlib
import gzip
import re
import select
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

from PIL import Image

from benchmarks.attack.job_inputs import png_bytes
from sdxl_worker.inputs.adapter_sources import SUFFIX

Sent = Iterator[bytes | float]
Behaviour = Callable[[], Sent]
DRIP_SECONDS = 5.0
REQUEST_MAX_BYTES = 65536
TLS_HANDSHAKE = b"\x16"


def head(status: str = "200 OK", *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", "Content-Type: image/png", *headers)
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def with_length(body: bytes, length: object, status: str = "200 OK") -> bytes:
    return head(status, f"Content-Length: {length}", "Connection: close") + body


def for_ever(first: bytes, again: bytes, pause_seconds: float = 0) -> Behaviour:
    def behaviour() -> Sent:
        yield first
        while True:
            yield again
            yield pause_seconds

    return behaviour


def once(*sent: bytes | float) -> Behaviour:
    return lambda: iter(sent)


def redirect(to: str) -> Behaviour:
    return once(head("302 Found", f"Location: {to}", "Content-Length: 0"))


PICTURE = png_bytes(Image.linear_gradient("L").resize((64, 64)).convert("RGB"))
PLAIN = head()
CHUNKED = head("200 OK", "Transfer-Encoding: chunked")
BLOCK = bytes(65536)


def _gzip_bomb() -> Sent:
    yield head("200 OK", "Content-Encoding: gzip")
    yield gzip.compress(gzip.compress(bytes(200_000_000), 6), 1)
    block = gzip.compress(bytes(10_000_000))
    for _ in range(100):
        yield block


def _cut() -> Sent:
    yield with_length(PICTURE[: len(PICTURE) // 2], len(PICTURE))


def _slow_redirects() -> Sent:
    yield 4.0
    yield head("302 Found", "Location: /slow-redirects", "Content-Length: 0")


# What never ends by itself: the worker has to.
ENDLESS: dict[str, Behaviour] = {
    "silence": for_ever(b"", b"", DRIP_SECONDS),
    "drip": for_ever(PLAIN, b"x", DRIP_SECONDS),
    "drip-head": for_ever(b"", b"H", DRIP_SECONDS),
    "drip-chunks": for_ever(CHUNKED, b"1\r\nx\r\n", DRIP_SECONDS),
    "drip-headers": for_ever(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", DRIP_SECONDS),
    "drip-error": for_ever(head("500 Oops"), b"x", DRIP_SECONDS),
    "continue": for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "early-hints": for_ever(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01),
    "continue-headers": for_ever(b"HTTP/1.1 100 Continue\r\n", b"X-A: b\r\n", 0.01),
    "headers": for_ever(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 1000),
    "header-line": for_ever(b"HTTP/1.1 200 OK\r\nX-A: ", BLOCK),
    "status-line": for_ever(b"HTTP/1.1 200 ", b"O" * 65536),
    "body": for_ever(PLAIN, BLOCK),
    "chunk-size": for_ever(CHUNKED, b"0" * 65536),
    "chunk-extension": for_ever(CHUNKED + b"1;", b"x" * 65536),
    "trailers": for_ever(CHUNKED + b"0\r\n", b"X-A: b\r\n" * 1000),
}
OTHERS: dict[str, Behaviour] = {
    "gzip-bomb": _gzip_bomb,
    "redirect-loop": redirect("/redirect-loop"),
    "slow-redirects": _slow_redirects,
    "redirect-to-file": redirect("file:///etc/passwd"),
    "redirect-to-ftp": redirect("ftp://127.0.0.1/a.png"),
    "redirect-to-junk": redirect("http://["),
    "redirect-to-data": redirect("data:image/png;base64,AAAA"),
    "redirect-without-location": once(head("302 Found", "Content-Length: 0")),
    "length-too-long": once(with_length(PICTURE, len(PICTURE) + 1000)),
    "length-too-short": once(with_length(PICTURE, 30)),
    "length-negative": once(with_length(PICTURE, -1)),
    "length-huge": once(with_length(PICTURE, 10**18)),
    "length-junk": once(with_length(PICTURE, "many")),
    "length-twice": once(head("200 OK", "Content-Length: 9", "Content-Length: 99") + PICTURE),
    "cut": _cut,
    "nothing": once(),
    "empty": once(with_length(b"", 0)),
    "html": once(with_length(b"<html><body>Sign in</body></html>", 33)),
    "missing": once(with_length(b"no", 2, "404 Not Found")),
    "broken": once(with_length(b"no", 2, "500 Internal Server Error")),
    "no-content": once(head("204 No Content")),
    "odd-status": once(with_length(b"no", 2, "999 ")),
    "long-reason": once(with_length(b"no", 2, "404 " + "x" * 60_000)),
    "strange-reason": once(with_length(b"no", 2, "404 \x1b[2J\x00\xff Traceback")),
    "chunk-junk": once(CHUNKED + b"zz\r\n" + PICTURE),
    "chunk-cut": once(CHUNKED + b"ffff\r\nabc"),
    "gzip-junk": once(head("200 OK", "Content-Encoding: gzip") + PICTURE),
    "unknown-coding": once(head("200 OK", "Content-Encoding: br, zstd, gzip") + PICTURE),
    "no-http": once(PICTURE),
    "old-http": once(b"<html>hello</html>\r\n"),
}
GOOD = {"good": once(with_length(PICTURE, len(PICTURE)))}
# Its address begins with https: the handshake drips.
TLS = {"tls": for_ever(b"\x16\x03\x03\x40\x00", b"\x02", DRIP_SECONDS)}


@dataclass(eq=False)
class Connection:
    """One that a worker opened. Times are those of time.monotonic()."""

    path: str
    request: bytes
    """Its head, and what of its body came with it."""
    closed_at: float | None = None


@dataclass
class HostileServer:
    """For a `with` block. It stands for the Hub as well: of a path, the last part counts."""

    more: dict[str, Behaviour] = field(default_factory=dict)
    """Behaviours beside those above."""
    connections: list[Connection] = field(default_factory=list)

    def __enter__(self) -> Self:
        owner = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                owner._serve(self.request)

        self._stopping = threading.Event()
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def address(self, name: str, query: str = "") -> str:
        origin = self.origin.replace("http", "https") if name in TLS else self.origin
        return f"{origin}/{name}?{query}"

    def open_count(self, name: str) -> int:
        """How many connections for this misbehaviour the worker holds open."""
        return sum(one.path == name and one.closed_at is None for one in list(self.connections))

    def wait_for(self, name: str, count: int, seconds: float) -> bool:
        """Whether the worker comes to hold exactly `count` connections open in time."""
        deadline = time.monotonic() + seconds
        while self.open_count(name) != count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _serve(self, connection: socket.socket) -> None:
        request = b""
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in request and len(request) < REQUEST_MAX_BYTES:
                request += (received := connection.recv(4096))
                if not received or request.startswith(TLS_HANDSHAKE):
                    break
        address = (request.split(b" ", 2)[1:2] or [b""])[0]
        path = unquote(address.partition(b"?")[0].strip(b"/").decode("latin-1"))
        name = path.rpartition("/")[2].removesuffix(SUFFIX)
        if request.startswith(TLS_HANDSHAKE):
            name = "tls"
        with contextlib.suppress(OSError):
            self._read_body(connection, request)
        noted = Connection(name, request)
        self.connections.append(noted)
        known = {**ENDLESS, **OTHERS, **GOOD, **TLS, **self.more}
        behaviour = known.get(name, OTHERS["missing"])
        with contextlib.suppress(OSError):
            connection.settimeout(0.5)
            for what in behaviour():
                if self._stopping.is_set():
                    break
                if isinstance(what, bytes):
                    self._send(connection, what)
                else:
                    self._pause(connection, what)
            if name == "cut":
                reset = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        noted.closed_at = time.monotonic()

    def _read_body(self, connection: socket.socket, request: bytes) -> None:
        """What is closed before all of it is read is taken for broken off."""
        head, _, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        left = int(length[1]) - len(body) if length else 0
        while left > 0 and (received := connection.recv(65536)):
            left -= len(received)

    def _send(self, connection: socket.socket, data: bytes) -> None:
        """As `sendall`, to a reader that may take its time."""
        while data and not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                data = data[connection.send(data) :]

    def _pause(self, connection: socket.socket, seconds: float) -> None:
        """Wait; end at once where the other side has gone."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self._stopping.is_set():
            if select.select([connection], [], [], min(left, 0.2))[0] and not connection.recv(4096):
                raise ConnectionResetError
