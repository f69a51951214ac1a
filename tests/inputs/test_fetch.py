"""The bytes of an input: where they may come from."""

import base64
import http.server
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import fetch as fetch_module
from sdxl_worker.inputs.fetch import fetch


def refusal(address: str) -> str:
    with pytest.raises(RequestError) as caught:
        fetch(address, "image_url")
    message = str(caught.value)
    assert message.startswith("image_url: ")
    return message


DATA = np.random.default_rng(0).bytes(20_000)


def test_a_data_uri_may_be_in_capitals_and_broken_into_lines() -> None:
    payload = base64.b64encode(DATA).decode()
    lines = "\r\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    assert fetch(f"DATA:IMAGE/PNG;BASE64,{lines}", "image_url") == DATA


def test_a_data_uri_is_decoded() -> None:
    payload = base64.b64encode(DATA).decode()
    assert fetch(f"data:image/png;base64,{payload}", "image_url") == DATA


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


class PictureServer(http.server.BaseHTTPRequestHandler):
    """`/a.png` has the data; the other paths are what can go wrong."""

    queries: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.queries.append(query)
        body, status = DATA, 200
        if path == "/missing.png":
            body, status = b"no", 404
        elif path == "/moved.png":
            status = 302
        self.send_response(status)
        self.send_header("Location", "/a.png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def private_addresses_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")


@pytest.mark.usefixtures("private_addresses_allowed")
class TestFetching:
    def test_an_address_is_fetched(self, server: str) -> None:
        assert fetch(f"{server}/a.png?key=1", "image_url") == DATA
        assert PictureServer.queries[-1] == "key=1"

    def test_a_redirect_is_followed(self, server: str) -> None:
        assert fetch(f"{server}/moved.png", "image_url") == DATA

    def test_what_the_server_answers_is_told(self, server: str) -> None:
        assert "answered 404 Not Found" in refusal(f"{server}/missing.png")

    def test_a_download_has_a_limit(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch_module, "MAX_DOWNLOAD_BYTES", 1000)
        assert "size cap" in refusal(f"{server}/a.png")

    def test_a_dead_server_is_told(self, server: str) -> None:
        port = int(server.rpartition(":")[2])
        with pytest.raises(RequestError, match=r"could not be fetched \(ConnectionError\)"):
            fetch(f"http://127.0.0.1:{port % 60000 + 1024}/a.png", "image_url")

    def test_a_port_that_is_no_number_is_told(self) -> None:
        assert "could not be fetched" in refusal("http://127.0.0.1:http/a.png")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0.0.0.0", "2130706433"],
)
def test_private_addresses_are_not_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("connected"))
    assert "does not fetch this" in refusal(f"http://{host}/a.png")


def test_a_redirect_to_a_private_address_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    from runpod.serverless.utils import rp_ssrf

    def redirect(_: Any, url: str, **__: Any) -> tuple[Any, Any]:
        assert "198.51" not in url or url.startswith("http://8.8.8.8"), url
        response = type("Response", (), {})()
        response.status_code, response.headers = 302, {"Location": "http://127.0.0.1/a.png"}
        response.close = lambda: None
        return type("Session", (), {"close": lambda _: None})(), response

    monkeypatch.setattr(rp_ssrf, "_get_via_first_reachable_ip", redirect)
    assert "non-public address 127.0.0.1" in refusal("http://8.8.8.8/a.png")


def test_the_field_that_is_to_blame_is_named() -> None:
    for address in ("data:image/png,abc", "http://127.0.0.1/a.png"):
        with pytest.raises(RequestError, match=r"^init_image: "):
            fetch(address, "init_image")
