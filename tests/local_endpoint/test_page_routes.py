"""The page's files and the permission for pages from elsewhere, as HTTP."""

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from client.one_file import SCHEMA, one_file, page_files
from local_endpoint import LocalEndpoint
from local_endpoint.server import REPOSITORY

PREFLIGHT = {
    "Access_Control_Request_Method": "POST",
    "Access_Control_Request_Headers": "authorization,content-type",
}
ORIGIN = "https://pages.example"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LocalEndpoint]:
    with LocalEndpoint(workers=0) as running:
        yield running


@pytest.fixture(scope="module")
def allowing() -> Iterator[LocalEndpoint]:
    with LocalEndpoint(workers=0, allow_origin=ORIGIN) as running:
        yield running


def ask(
    endpoint: LocalEndpoint, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    """One request, exactly as it is written: status, headers, body."""
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=30)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=names)
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, told, answer.read().decode()
    finally:
        connection.close()


def test_the_page_is_served_without_a_key_and_with_its_policy(endpoint: LocalEndpoint) -> None:
    for path in ("/", *(f"/{name}" for name in page_files()), "/input.schema.json"):
        status, headers, _ = ask(endpoint, path)
        assert status == 200, path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        policy = headers["content-security-policy"].split("; ")
        assert {
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        } <= set(policy)
        assert "unsafe" not in headers["content-security-policy"]
    assert ask(endpoint, "/main.js")[1]["content-type"].startswith("text/javascript")
    assert ask(endpoint, "/page.css")[1]["content-type"].startswith("text/css")
    assert ask(endpoint, "/input.schema.json")[2] == SCHEMA.read_text(encoding="utf-8")
    assert ask(endpoint, "/sdxl.html")[2] == one_file()


@pytest.mark.parametrize(
    "path",
    [
        *("/one_file.py", "/../one_file.py", "/%2e%2e/one_file.py", "/..%2fone_file.py"),
        *("/page/main.js", "//main.js", "/main.js/", "/main.js%00", "/__init__.py", "/.git/config"),
    ],
)
def test_nothing_else_is_served(endpoint: LocalEndpoint, path: str) -> None:
    assert ask(endpoint, path)[0] == 401
    key = f"Bearer {endpoint.api_key}"
    assert ask(endpoint, path, Authorization=key)[0] == 404


def test_the_page_takes_no_other_method(endpoint: LocalEndpoint) -> None:
    assert ask(endpoint, "/page-config.json", "POST")[0] == 405


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000"])
def test_this_machine_is_told_the_key(endpoint: LocalEndpoint, host: str) -> None:
    status, _, body = ask(endpoint, "/page-config.json", Host=host)
    assert (status, json.loads(body)) == (200, {"url": endpoint.url, "api_key": endpoint.api_key})


@pytest.mark.parametrize(
    "headers",
    [
        *({"Host": host} for host in ("evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil")),
        {"Host": ""},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_nobody_else_is_told_the_key(endpoint: LocalEndpoint, headers: dict[str, str]) -> None:
    status, _, body = ask(endpoint, "/page-config.json", **headers)
    assert status in (400, 403)
    assert endpoint.api_key not in body


def test_pages_from_elsewhere_are_not_answered_by_default(endpoint: LocalEndpoint) -> None:
    for origin in ("null", ORIGIN):
        for method in ("GET", "OPTIONS"):
            path = f"{urlsplit(endpoint.url).path}/health"
            status, headers, _ = ask(endpoint, path, method, Origin=origin, **PREFLIGHT)
            assert status == 401
            assert not [name for name in headers if name.startswith("access-control")]


def test_an_allowed_origin_may_call_the_endpoint(allowing: LocalEndpoint) -> None:
    path = f"{urlsplit(allowing.url).path}/run"
    status, headers, _ = ask(allowing, path, "OPTIONS", Origin=ORIGIN, **PREFLIGHT)
    assert status == 204
    assert headers["access-control-allow-origin"] == ORIGIN
    assert headers["access-control-allow-headers"] == "Authorization, Content-Type"
    assert headers["vary"] == "Origin"
    for key in (allowing.api_key, "wrong"):  # errors can be read as well
        health = f"{urlsplit(allowing.url).path}/health"
        _, headers, body = ask(allowing, health, Origin=ORIGIN, Authorization=f"Bearer {key}")
        assert headers["access-control-allow-origin"] == ORIGIN
        assert json.loads(body)


def test_another_origin_may_not(allowing: LocalEndpoint) -> None:
    for origin in ("null", "https://pages.example.evil", "http://pages.example", ""):
        path = f"{urlsplit(allowing.url).path}/run"
        _, headers, _ = ask(allowing, path, "OPTIONS", Origin=origin, **PREFLIGHT)
        assert "access-control-allow-origin" not in headers


def test_an_allowed_origin_does_not_read_the_key(allowing: LocalEndpoint) -> None:
    _, headers, _ = ask(allowing, "/page-config.json", Origin=ORIGIN)
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("wrong", ["*", "pages.example", "https://pages.example/path", ""])
def test_what_is_no_origin_is_refused(wrong: str) -> None:
    command = [sys.executable, "-m", "local_endpoint", "--port", "0", "--allow-origin", wrong]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "ORIGIN: must be like https://example.com, or null" in ended.stderr
