"""The bytes of an input: where they may come from, and what a hostile server can do."""

import asyncio
import base64
import contextlib
import gzip
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import connections
from sdxl_worker.inputs import fetch as fetch_module
from sdxl_worker.inputs.fetch import fetch

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
QUERY = "key=hunter2"


def refusal(address: str) -> str:
    return asyncio.run(async_refusal(address))


async def async_refusal(address: str) -> str:
    with pytest.raises(RequestError) as caught:
        await fetch(address, "image_url")
    message = str(caught.value)
    assert message.startswith("image_url: ")
    assert "hunter2" not in message
    return message


DATA = np.random.default_rng(0).bytes(20_000)


def test_a_data_uri_may_be_in_capitals_and_broken_into_lines() -> None:
    payload = base64.b64encode(DATA).decode()
    lines = "\r\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    assert asyncio.run(fetch(f"DATA:IMAGE/PNG;BASE64,{lines}", "image_url")) == DATA


def test_a_data_uri_is_decoded() -> None:
    payload = base64.b64encode(DATA).decode()
    assert asyncio.run(fetch(f"data:image/png;base64,{payload}", "image_url")) == DATA


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png,abc", "must read data:image/png;base64,"),
        ("data:image/png;base64", "must read data:image/png;base64,"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,\u00e4\u00e4\u00e4\u00e4", "not valid base64"),
    ],
)
def test_a_wrong_data_uri_is_answered_with_the_reason(uri: str, reason: str) -> None:
    assert reason in refusal(uri)


class Server:
    """Answers each connection as the path of its address says; keeps count of those open."""

    def __init__(self, behaviours: dict[str, Behaviour]) -> None:
        self.behaviours = behaviours
        self.targets: list[str] = []
        self.open = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            self.targets.append(request.split(b" ")[1].decode())
            await self.behaviours[self.targets[-1].partition("?")[0]](reader, writer)
            await writer.drain()
        except OSError:
            pass
        finally:
            self.open -= 1
            writer.close()


def answering(head: bytes, body: bytes = b"") -> Behaviour:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body)

    return answer


def redirecting(location: bytes) -> Behaviour:
    return answering(b"302 Found\nLocation: " + location + b"\nContent-Length: 0")


def endless(start: bytes, again: bytes, pause_seconds: float = 0) -> Behaviour:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while not reader.at_eof() and not writer.is_closing():
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(pause_seconds)

    return answer


async def nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


OK = b"200 OK\nContent-Length: %d" % len(DATA)
BEHAVIOURS = {
    "/a.png": answering(OK, DATA),
    "/%7E%27.png": answering(OK, DATA),
    "/%C3%A4%20.png": answering(OK, DATA),
    "/missing.png": answering(b"404 hunter2\nContent-Length: 0"),
    "/moved.png": redirecting(b"/a.png"),
    "/loop.png": redirecting(b"/loop.png?" + QUERY.encode()),
    "/junk.png": redirecting(b"http://]a[@/"),
    "/nowhere.png": answering(b"302 Found\nContent-Length: 0"),
    "/file.png": redirecting(b"file:///etc/passwd"),
    "/ftp.png": redirecting(b"ftp://127.0.0.1/a.png"),
    "/hints.png": endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000),
    "/no-http.png": answering(b"no"),
    "/cut.png": answering(OK, DATA[:1000]),
    "/bad-chunks.png": answering(b"200 OK\nTransfer-Encoding: chunked", b"hunter2\r\n"),
    "/bad-gzip.png": answering(b"200 OK\nContent-Encoding: gzip\nContent-Length: 2", b"no"),
    "/too-many-headers.png": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 100),
    "/endless.png": endless(b"HTTP/1.1 200 OK\r\n\r\n", bytes(100_000)),
    "/says-it-is-large.png": answering(b"200 OK\nContent-Length: 999999999999"),
    "/bomb.png": answering(
        b"200 OK\nContent-Encoding: gzip", gzip.compress(bytes(60 * 1024**2), 9)
    ),
}
SLOW = {
    "/silent.png": nothing,
    "/drip.png": endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.05),
    "/dripping-headers.png": endless(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.05),
    "/continue.png": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10, 0.001),
}


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, Server]]:
    server = Server(BEHAVIOURS | SLOW)
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", server


def fetched(path: str) -> bytes:
    async def get() -> bytes:
        async with serving() as (url, _):
            return await fetch(f"{url}{path}", "image_url")

    return asyncio.run(get())


def refused(path: str) -> str:
    async def get() -> str:
        async with serving() as (url, _):
            return await async_refusal(f"{url}{path}?{QUERY}")

    return asyncio.run(get())


async def closed(server: Server, seconds: float) -> bool:
    """Whether all connections to the server are closed within that time."""
    deadline = time.monotonic() + seconds
    while server.open and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return server.open == 0


@pytest.fixture
def private_addresses_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")


@pytest.mark.usefixtures("private_addresses_allowed")
class TestFetching:
    @pytest.mark.parametrize("path", ["/a.png", "/a.png?x=%27%2B~&y", "/moved.png", "/ä .png"])
    def test_an_address_is_fetched(self, path: str) -> None:
        assert fetched(path) == DATA

    def test_an_address_is_sent_as_it_is_written(self) -> None:
        """A signature in the query may cover it."""

        async def get() -> list[str]:
            async with serving() as (url, server):
                await fetch(f"{url}/%7E%27.png?a=%7e%27&Signature=x%2By~", "image_url")
                return server.targets

        assert asyncio.run(get()) == ["/%7E%27.png?a=%7e%27&Signature=x%2By~"]

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("/missing.png", "answered 404 Not Found"),
            ("/loop.png", "redirects more than 5 times"),
            ("/nowhere.png", "redirects to nowhere"),
            ("/junk.png", "not an address"),
            ("/file.png", "not http:// or https://"),
            ("/ftp.png", "not http:// or https://"),
            ("/no-http.png", "does not speak HTTP"),
            ("/cut.png", "broke off"),
            ("/bad-chunks.png", "broke off"),
            ("/bad-gzip.png", "broke off"),
            ("/too-many-headers.png", "broke off"),
            ("/endless.png", "more than 50 MB"),
            ("/says-it-is-large.png", "more than 50 MB"),
            ("/bomb.png", "more than 50 MB"),
        ],
    )
    def test_what_is_wrong_is_told_without_the_address(self, path: str, reason: str) -> None:
        assert reason in refused(path)

    def test_a_dead_server_is_told(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            assert "cannot be reached" in refusal(f"http://127.0.0.1:{port}/a.png?{QUERY}")

    def test_a_host_that_is_not_there_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nobody(*_: Any) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "hunter2")

        monkeypatch.setattr(socket, "getaddrinfo", nobody)
        assert "host cannot be found" in refusal(f"http://hunter2.invalid/a.png?{QUERY}")

    @pytest.mark.parametrize(
        "address",
        [
            "http://127.0.0.1:http/a",
            "http://[x/a",
            f"http://{'a' * 300}/a",
            "http://a\\b",
            "http://]a[@/",
            "http://[]]@/",
            "http://x]0[@?",
        ],
    )
    def test_an_address_that_is_none_is_told(self, address: str) -> None:
        assert "not an address" in refusal(address)

    @pytest.mark.parametrize("path", SLOW)
    def test_one_deadline_covers_all_of_it(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetch_module, "FETCH_TIMEOUT_SECONDS", 0.5)

        async def get() -> None:
            async with serving() as (url, server):
                began = time.monotonic()
                assert "within" in await async_refusal(f"{url}{path}?{QUERY}")
                assert time.monotonic() - began < 3
                assert await closed(server, 1), "the connection was left open"

        asyncio.run(get())

    @pytest.mark.parametrize("path", [*SLOW, "/endless.png"])
    def test_a_cancelled_fetch_closes_its_connection_at_once(self, path: str) -> None:
        async def get() -> None:
            async with serving() as (url, server):
                fetching = asyncio.create_task(fetch(f"{url}{path}", "image_url"))
                while not server.targets:
                    await asyncio.sleep(0.01)
                fetching.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await fetching
                assert await closed(server, 1)

        asyncio.run(get())

    def test_a_name_server_that_does_not_answer_holds_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither other jobs, which use asyncio's threads, nor the end of the worker."""
        answer = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer.wait(30) or [])
        monkeypatch.setattr(fetch_module, "FETCH_TIMEOUT_SECONDS", 0.3)

        async def get() -> None:
            asking = [async_refusal(f"http://name-{i}.invalid/a.png") for i in range(40)]
            for message in await asyncio.gather(*asking):
                assert "within" in message
            assert await asyncio.to_thread(lambda: 1) == 1

        began = time.monotonic()
        asyncio.run(get())
        assert time.monotonic() - began < 10
        answer.set()


@pytest.mark.usefixtures("private_addresses_allowed")
def test_a_server_that_floods_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served from another thread, because it, too, takes all of its loop's time."""
    monkeypatch.setattr(fetch_module, "FETCH_TIMEOUT_SECONDS", 2)
    urls: list[str] = []
    told, done = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving() as (url, _):
            urls.append(url)
            told.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    told.wait()

    async def flooded() -> list[float]:
        fetches = [asyncio.create_task(async_refusal(f"{urls[0]}/hints.png")) for _ in range(3)]
        gaps = []
        while not all(one.done() for one in fetches):
            began = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - began)
        assert all("within" in one.result() for one in fetches)
        return gaps

    try:
        assert sorted(asyncio.run(flooded()))[-5] < 0.5
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0.0.0.0", "0x7f.1"],
)
def test_private_addresses_are_not_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def get() -> None:
        monkeypatch.setattr(
            connections._loop(), "sock_connect", lambda *_: pytest.fail("connected")
        )
        assert "public addresses only" in await async_refusal(f"http://{host}/a.png?{QUERY}")

    asyncio.run(get())


def test_a_redirect_to_a_private_address_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first server, on this machine, stands for a public one."""
    seen: list[str] = []

    def is_public(address: str) -> bool:
        seen.append(address)
        return len(seen) == 1

    monkeypatch.setattr(connections, "is_public", is_public)

    async def get() -> None:
        async with serving() as (url, server):
            assert "public addresses only" in await async_refusal(f"{url}/moved.png")
            assert server.targets == ["/moved.png"]

    asyncio.run(get())
    assert seen == ["127.0.0.1"] * 2


def test_the_field_that_is_to_blame_is_named() -> None:
    for address in ("data:image/png,abc", "http://127.0.0.1/a.png"):
        with pytest.raises(RequestError, match=r"^init_image: "):
            asyncio.run(fetch(address, "init_image"))
