"""The local endpoint survives what no proper client or worker sends: no request is answered 500."""

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from local_endpoint import LocalEndpoint, Rules

CLIENT_ROUTES = (
    *("POST run", "POST runsync", "GET status/{}", "POST status/{}", "GET stream/{}"),
    *("POST stream/{}", "POST cancel/{}", "POST retry/{}", "POST purge-queue", "GET health"),
)
WORKER_ROUTES = (
    *("GET job-take/{}", "GET job-take-batch/{}", "GET job-stop/{}", "GET ping/{}"),
    *("POST job-done/{}/{}", "POST job-stream/{}/{}"),
)
ROUTES = CLIENT_ROUTES + WORKER_ROUTES
BODY_ROUTES = tuple(
    route for route in ROUTES if route in ("POST run", "POST runsync") or "/{}/" in route
)

DEEP = 100_000
BAD_BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "deep": b'{"input": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"input": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "deep, as far as Python reads it": b'{"input": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep and not ended": b"[" * DEEP,
    "NaN": b'{"input": NaN, "output": NaN}',
    "Infinity": b'{"input": -Infinity, "output": -Infinity}',
    "a number no float holds": b'{"input": 1e999, "output": 1e999}',
    "an endless integer": b'{"input": ' + b"9" * 5000 + b"}",
    "invalid UTF-8": b'{"input": "\xff", "output": "\xff"}',
    "half a UTF-8 character": b'{"input": "\xc3"}',
    "UTF-8 of a surrogate": b'{"input": "\xed\xa0\x80"}',
    "UTF-16": '{"input": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"input": 1}',
    "two values": b'{"input": 1} {"input": 2}',
    "a number": b"1",
    "null": b"null",
    "a string": b'"input"',
    "a list": b'[{"input": 1}]',
}
ODD_BODIES = {
    "empty input": b'{"input": {}}',
    "no input": b'{"output": null, "error": null}',
    "duplicate keys": b'{"input": 1, "input": 2, "output": 1, "output": 2}',
    "lone surrogates": rb'{"input": "\ud800", "output": "\ud800", "error": "\udfff"}',
    "NUL": rb'{"input": "\u0000", "output": "\u0000"}',
    "a large number": b'{"input": ' + b"9" * 4000 + b', "output": 1e308}',
    "odd statuses": b'{"input": 1, "status": ["IN_PROGRESS"], "stopPod": "true", "error": {}}',
    "odd neighbours": b'{"input": 1, "webhook": 3, "s3Config": [], "policy": null}',
    "thousands of control pictures": b'{"input": {"prompt": "a", "controlnet": ['
    + b",".join([b"{}"] * 10_000)
    + b"]}}",
    "odd control pictures": rb'{"input": {"controlnet": {"0": []}, "hires": [[]], "x": "\ud800"}}',
    "webhooks that are none": rb'{"input": 1, "webhook": "http://\ud800[/"}',
}
BAD_POLICIES = [
    *("[]", '"a"', "0", "false", "[1]", '{"ttl": "1"}', '{"ttl": []}', '{"ttl": -1}'),
    *('{"executionTimeout": true}', '{"ttl": 1' + "0" * 400 + "}", '{"executionTimeout": 1e300}'),
    *('{"ttl": ' + "[" * 400 + "]" * 400 + "}", '{"ttl": {"a": "' + "x" * 5000 + '"}}'),
]
ODD_NAMES = [
    *("a", "%00", "%0A", "%0d%0aX: 1", "%ff", "%C3", "%", "%zz", "%2F", "..%2F..%2Fx", "%2e%2e"),
    *(
        "..",
        "...",
        ".",
        "&",
        "%26",
        "a&b=c",
        ";",
        "a;b",
        "*",
        "{a}",
        "%7Ba%7D",
        "~",
        "%25",
        "%2525",
    ),
    *("\u00fc", "%F0%9F%92%A9", "%ED%A0%80", "x" * 5000, "$ID", "'", '"', "<script>"),
]
ODD_QUERIES = [
    *("", "?", "?&", "?=", "?a", "?%ff=%ff", "?wait=", "?batch_size=", "?job_id=,,,&job_id=a"),
    *("?status=unhealthy", "?status=unhealthy&reason=%ff", "?ttl=a", "?x=" + "y" * 5000),
    *("?" + "a=b&" * 1000, "?isStream=perhaps", "?job_in_progress=2", "&batch_size=1", "?;"),
]
BAD_NUMBERS = [
    *(
        "x",
        "-1",
        "0",
        "1e3",
        "1.5",
        "%20",
        "+1",
        "0x10",
        "",
        "1000000000",
        "9" * 5000,
        "%ff",
        "nan",
    ),
    *("%C2%B2", "1_0", "True", "null", "[]"),  # the second one is a superscript two
]
ODD_HEADERS = {
    "gzip that is none": (b"Content-Encoding: gzip", b"{}"),
    "deflate that is none": (b"Content-Encoding: deflate", b'{"input": 1}'),
    "an encoding that there is not": (b"Content-Encoding: rot13", b'{"input": 1}'),
    "a charset that there is not": (b"Content-Type: application/json; charset=klingon", b"{}"),
    "a content type that is none": (b"Content-Type: \xff/\xfe;;;=", b"{}"),
    "a cookie that is none": (b"Cookie: \xff=\xff; =;;", b"{}"),
    "an expectation": (b"Expect: 418-teapot", b"{}"),
    "a range": (b"Range: bytes=9-1", b"{}"),
    "a date that is none": (b"If-Modified-Since: yesterday", b"{}"),
    "a host that is none": (b"X-Forwarded-Host: [", b"{}"),
    "a long header": (b"X-Long: " + b"x" * 5000, b"{}"),
    "a huge header": (b"X-Huge: " + b"x" * 500_000, b"{}"),
    "many headers": (b"\r\n".join(b"X-%d: a" % i for i in range(3000)), b"{}"),
    "latin-1": (b"X-Name: \xfc\x80", b"{}"),
}
ODD_LINES = [
    *("GET /", "GET //", "GET /v2", "GET /v2/", "GET /v2//", "GET /v2/ENDPOINT_ID"),
    *("GET /v2/ENDPOINT_ID/", "GET /v2/ENDPOINT_ID//", "GET /v2/%ff/health", "GET /v2/a%2Fb/run"),
    *("OPTIONS *", "GET *", "CONNECT 127.0.0.1:1", "GET http://127.0.0.1/v2/ENDPOINT_ID/health"),
    *("GET http://[/", "GET health", "BREW /v2/ENDPOINT_ID/run", "PUT /v2/ENDPOINT_ID/run"),
    *("DELETE /v2/ENDPOINT_ID/status/a", "HEAD /v2/ENDPOINT_ID/health", "GET /v2/ENDPOINT_ID/%"),
    *("POST /v2/ENDPOINT_ID/job-done", "POST /v2/ENDPOINT_ID/job-done/a", "GET /%00", "GET \xff"),
    *(
        "POST /v2/ENDPOINT_ID/job%2Ddone/a/b",
        "GET /v2/ENDPOINT_ID/../health",
        "GET /" + "a/" * 2000,
    ),
]


@pytest.fixture(scope="module")
def bare() -> Iterator[LocalEndpoint]:
    rules = Rules(poll_seconds=0.02, runsync_wait_min_seconds=0.01, runsync_wait_seconds=0.02)
    with LocalEndpoint(workers=0, rules=rules) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _nothing_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """But for what the server's parser refuses with 400."""
    refusals = (HttpProcessingError, web.RequestPayloadError)
    yield
    for record in caplog.get_records("call"):
        is_refused = record.exc_info and isinstance(record.exc_info[1], refusals)
        assert record.levelno < logging.ERROR or is_refused, record.getMessage()


def send(
    endpoint: LocalEndpoint, line: str, *headers: bytes, body: bytes = b"", key: bytes | None = None
) -> tuple[int, Any]:
    """One request, as it is and however wrong: the status code, and the answer's JSON."""
    port = int(endpoint.url.split(":")[2].split("/")[0])
    method, _, target = line.partition(" ")
    key = endpoint.api_key.encode() if key is None else key
    head = [
        f"{method} {target} HTTP/1.1".encode("latin-1"),
        *(b"Host: 127.0.0.1", b"Connection: close", b"Authorization: " + key),
        *(b"Content-Length: %d" % len(body), *headers),
    ]
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass  # hung up in the middle of a huge request; it may have answered
    if not received:
        return 0, None
    answer_head, _, content = received.partition(b"\r\n\r\n")
    code = int(answer_head.split()[1])
    try:
        return code, json.loads(content)
    except ValueError:
        return code, content


def on(endpoint: LocalEndpoint, route: str, *names: str, query: str = "") -> str:
    method, _, path = route.partition(" ")
    return f"{method} /v2/{endpoint.endpoint_id}/{path.format(*names, *'abc')}{query}"


def assert_refused(answer: tuple[int, Any], code: int = 400) -> None:
    """With a reason that can be read."""
    assert answer[0] == code, answer
    assert list(answer[1]) == ["error"]
    assert isinstance(answer[1]["error"], str)
    assert 0 < len(answer[1]["error"]) < 500


@pytest.mark.parametrize(
    "key",
    [
        "\u00fc".encode(),
        b"\xfc",
        b"\xff\xfe",
        b"Bearer \xfc",
        b"",
        b"Bearer",
        b"x" * 5000,
        b"\x80" * 99,
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_any_other_key_is_a_wrong_key(bare: LocalEndpoint, route: str, key: bytes) -> None:
    assert_refused(send(bare, on(bare, route), key=key), 401)


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("route", BODY_ROUTES)
def test_a_body_that_is_no_request_is_refused(bare: LocalEndpoint, route: str, name: str) -> None:
    assert_refused(send(bare, on(bare, route), body=BAD_BODIES[name]))


@pytest.mark.parametrize("name", ODD_BODIES)
def test_an_odd_body_goes_all_the_way(bare: LocalEndpoint, name: str) -> None:
    """From the client to the worker and back: each answer is JSON again."""
    for route in BODY_ROUTES:
        assert send(bare, on(bare, route), body=ODD_BODIES[name])[0] < 500
    code, queued = send(bare, on(bare, "POST run"), body=ODD_BODIES[name])
    if code != 200:
        return
    code, jobs = send(bare, on(bare, "GET job-take-batch/{}", "w", query="?batch_size=1000"))
    assert code == 200
    assert queued["id"] in [job["id"] for job in jobs]
    for route in ("POST job-stream/{}/{}", "POST job-done/{}/{}"):
        assert send(bare, on(bare, route, "w", queued["id"]), body=ODD_BODIES[name])[0] == 200
    for route in ("GET status/{}", "GET stream/{}"):
        code, answer = send(bare, on(bare, route, queued["id"]))
        assert code == 200
        assert isinstance(answer, dict)


@pytest.mark.parametrize("policy", BAD_POLICIES)
def test_a_policy_that_is_none_is_refused(bare: LocalEndpoint, policy: str) -> None:
    for route in ("POST run", "POST runsync"):
        body = f'{{"input": 1, "policy": {policy}}}'.encode()
        answer = send(bare, on(bare, route), body=body)
        assert_refused(answer)
        assert answer[1]["error"].startswith("policy")


@pytest.mark.parametrize("number", BAD_NUMBERS)
def test_a_number_that_is_none_or_out_of_its_limits_is_refused(
    bare: LocalEndpoint, number: str
) -> None:
    for route, name in (("GET job-take-batch/{}", "batch_size"), ("POST runsync", "wait")):
        answer = send(bare, on(bare, route, query=f"?{name}={number}"), body=b'{"input": 1}')
        assert_refused(answer)
        assert answer[1]["error"].startswith(f"{name}: must be ")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_name_breaks_a_route(bare: LocalEndpoint, name: str) -> None:
    target = name.encode().decode("latin-1")
    for route in ROUTES:
        code, answer = send(bare, on(bare, route, target, target), body=b'{"input": 1}')
        assert 0 < code < 500, (route, code, answer)


@pytest.mark.parametrize("query", ODD_QUERIES)
def test_no_query_breaks_a_route(bare: LocalEndpoint, query: str) -> None:
    for route in ROUTES:
        code, answer = send(bare, on(bare, route, query=query), body=b'{"input": 1}')
        assert 0 < code < 500, (route, code, answer)


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_no_header_breaks_a_route(bare: LocalEndpoint, name: str) -> None:
    header, body = ODD_HEADERS[name]
    for route in ROUTES:
        code, answer = send(bare, on(bare, route), header, body=body)
        assert code < 500, (route, code, answer)


@pytest.mark.parametrize("line", ODD_LINES)
def test_no_request_line_breaks_the_server(bare: LocalEndpoint, line: str) -> None:
    code, answer = send(bare, line)
    assert 0 < code < 500, answer


@pytest.mark.parametrize(
    "chunks", [b"zz\r\n", b"5\r\n{}\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n"]
)
def test_a_body_in_bad_chunks_is_refused(bare: LocalEndpoint, chunks: bytes) -> None:
    for route in BODY_ROUTES:
        port = int(bare.url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            head = f"{on(bare, route)} HTTP/1.1\r\nHost: a\r\nAuthorization: {bare.api_key}\r\n"
            connection.sendall(
                head.encode() + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks
            )
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        assert answer == b"" or answer.split()[1].startswith(b"4"), answer


def test_all_of_it_leaves_the_endpoint_at_work(bare: LocalEndpoint) -> None:
    bare.with_queue(lambda queue: queue.purge())
    job_id = bare.run("proper")
    assert bare.call("job-take/w?gpu=x&job_in_progress=0") == (
        200,
        {"id": job_id, "input": "proper"},
    )
    assert bare.call(f"job-done/w/{job_id}?isStream=false", {"output": 1})[0] == 200
    assert bare.wait(job_id)["output"] == 1
