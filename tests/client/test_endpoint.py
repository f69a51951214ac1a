"""client/endpoint.py: addresses and keys, and an endpoint or a network in trouble."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client import endpoint as endpoint_module
from client.endpoint import (
    LOCAL_KEY,
    LOCAL_URL,
    Address,
    Endpoint,
    EndpointError,
    UnknownFateError,
    WrongEndpointError,
    find_address,
)
from local_endpoint import LocalEndpoint
from tests.client.conftest import InProcess, environment

KEY = "rpa_THE-KEY"
REMOTE = "https://api.runpod.ai/v2/abc123"


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDXL_ENDPOINT", "SDXL_API_KEY", "RUNPOD_ENDPOINT_ID", "RUNPOD_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE_SECONDS", 0.05)


# Addresses and keys.


@pytest.mark.parametrize(
    ("variables", "argument", "url", "key"),
    [
        ({}, None, LOCAL_URL, LOCAL_KEY),
        ({"RUNPOD_API_KEY": KEY}, None, LOCAL_URL, LOCAL_KEY),
        ({"RUNPOD_ENDPOINT_ID": "abc123", "RUNPOD_API_KEY": KEY}, None, REMOTE, KEY),
        ({"SDXL_ENDPOINT": "abc123", "SDXL_API_KEY": KEY}, None, REMOTE, KEY),
        ({"SDXL_ENDPOINT": "x", "SDXL_API_KEY": KEY}, "abc123", REMOTE, KEY),
        ({"RUNPOD_API_KEY": KEY}, f"{REMOTE}/run/", REMOTE, KEY),
        ({"SDXL_API_KEY": KEY}, "http://10.0.0.7:8000/v2/a", "http://10.0.0.7:8000/v2/a", KEY),
    ],
)
def test_the_endpoint_and_its_key_are_found(
    variables: dict[str, str],
    argument: str | None,
    url: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_address(argument, None) == Address(url, key)


@pytest.mark.parametrize(
    "endpoint",
    ["https://example.com/v2/a", "https://runpod.ai.example.com/v2/a", "https://a.xrunpod.ai"],
)
def test_the_platform_s_key_is_not_for_others(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    with pytest.raises(WrongEndpointError, match="needs an API key: set SDXL_API_KEY"):
        find_address(endpoint, None)


def test_the_platform_is_not_asked_where_all_can_read_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RUNPOD_API_KEY", "SDXL_API_KEY"):
        monkeypatch.setenv(name, KEY)
        with pytest.raises(WrongEndpointError, match="over https:// alone"):
            find_address("http://api.runpod.ai/v2/abc123", None)


def test_a_key_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    address = find_address("abc123", str(tmp_path / "key"))
    assert address.api_key == KEY
    assert KEY not in f"{address!r} {address}"
    with pytest.raises(WrongEndpointError, match="--api-key-file: .* cannot be read"):
        find_address("abc123", str(tmp_path / "none"))


@pytest.mark.parametrize(
    "endpoint", ["ftp://a/b", "https://", "a b", "https://a:hunter2@b.c", "//x"]
)
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(WrongEndpointError, match="--endpoint: must") as caught:
        find_address(endpoint, None)
    assert "hunter2" not in str(caught.value)


# Trouble, at the local endpoint.


def at(local: LocalEndpoint, call: Callable[[Endpoint], Any]) -> tuple[Any, list[str]]:
    """What the call returns, and the troubles that were told meanwhile."""
    troubles: list[str] = []

    async def run() -> Any:
        async with Endpoint(Address(local.url, local.api_key), troubles.append) as endpoint:
            return await call(endpoint)

    return asyncio.run(run()), troubles


def send(local: LocalEndpoint) -> tuple[str, list[str]]:
    return at(local, lambda endpoint: endpoint.run({"prompt": "a"}, lambda _: None))


@pytest.mark.parametrize("fault", ["answer 429", "answer 500", "answer 503", "drop", "drop_answer"])
@pytest.mark.parametrize("route", ["status", "cancel"])
def test_questions_are_asked_again(route: str, fault: str, idle_endpoint: LocalEndpoint) -> None:
    job_id, _ = send(idle_endpoint)
    if fault.startswith("answer"):
        idle_endpoint.faults.answer(route, int(fault[-3:]), times=2)
    else:
        getattr(idle_endpoint.faults, fault)(route, times=2)
    answer, troubles = at(idle_endpoint, lambda endpoint: getattr(endpoint, route)(job_id))
    assert (answer if route == "cancel" else answer["status"]) in ("IN_QUEUE", "CANCELLED")
    # aiohttp asks once more by itself where a connection broke.
    assert len(troubles) in ((1, 2) if fault.startswith("drop") else (2,))
    assert idle_endpoint.faults.pending == []


def test_a_retry_after_is_kept_to(idle_endpoint: LocalEndpoint) -> None:
    job_id, _ = send(idle_endpoint)
    endpoint_module.LONGEST_PAUSE_SECONDS = 1
    idle_endpoint.faults.answer("status", 429, headers={"Retry-After": "2"})
    began = time.monotonic()
    at(idle_endpoint, lambda endpoint: endpoint.status(job_id))
    assert time.monotonic() - began >= 2


def test_trouble_that_does_not_end_is_given_up(
    idle_endpoint: LocalEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, _ = send(idle_endpoint)
    monkeypatch.setattr(endpoint_module, "TROUBLE_SECONDS", 0.3)
    idle_endpoint.faults.answer("status", 502, body="<html>", times=1000)
    with pytest.raises(EndpointError, match="the endpoint answered 502; tried for 0.3 s"):
        at(idle_endpoint, lambda endpoint: endpoint.status(job_id))


def test_a_job_that_was_refused_for_the_number_of_requests_is_sent_again(
    idle_endpoint: LocalEndpoint,
) -> None:
    idle_endpoint.faults.answer("run", 429, times=2)
    job_id, troubles = send(idle_endpoint)
    assert [job.id for job in idle_endpoint.jobs] == [job_id]
    assert troubles == ["the endpoint takes no more requests for now (429)"] * 2


@pytest.mark.parametrize("fault", ["drop", "drop_answer", "500", "502", "nonsense"])
def test_a_job_whose_answer_was_lost_is_not_sent_again(
    fault: str, idle_endpoint: LocalEndpoint
) -> None:
    if fault in ("drop", "drop_answer"):
        getattr(idle_endpoint.faults, fault)("run")
    else:
        is_code = fault.isdecimal()
        body = "<html>" if is_code else '{"id": 7}'
        idle_endpoint.faults.answer("run", int(fault) if is_code else 200, body=body)
    with pytest.raises(UnknownFateError, match="whether it did is not known") as caught:
        send(idle_endpoint)
    assert idle_endpoint.api_key not in str(caught.value)
    sent = [one for one in idle_endpoint.record.exchanges if one.route == "run"]
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("code", "body", "told"),
    [
        (401, "{}", "(401): see SDXL_API_KEY, RUNPOD_API_KEY or --api-key-file"),
        (404, "", "address as far as /v2/ENDPOINT_ID, with --endpoint"),
        (413, '{"error": "by far"}', "the request is too large for 127.0.0.1: by far"),
        (400, '{"error": "no\\ninput"}', "127.0.0.1 answered 400: no input"),
        (400, "<html>a page</html>", "127.0.0.1 answered 400"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_in_words(
    code: int, body: str, told: str, idle_endpoint: LocalEndpoint
) -> None:
    idle_endpoint.faults.answer("run", code, body=body)
    with pytest.raises(EndpointError) as caught:
        send(idle_endpoint)
    assert str(caught.value).endswith(told)
    assert "html" not in str(caught.value)


@pytest.mark.parametrize("body", ["[" * 200_000, '{"id": ' + "9" * 10_000 + "}"])
def test_an_answer_that_cannot_be_read_is_none(body: str, idle_endpoint: LocalEndpoint) -> None:
    idle_endpoint.faults.answer("run", 200, body=body)
    with pytest.raises(UnknownFateError):
        send(idle_endpoint)


def test_where_https_is_not_spoken_it_is_told_at_once(idle_endpoint: LocalEndpoint) -> None:
    address = Address(idle_endpoint.url.replace("http:", "https:"), KEY)

    async def call(ask: Callable[[Endpoint], Any]) -> None:
        async with Endpoint(address) as endpoint:
            await ask(endpoint)

    asks: list[Callable[[Endpoint], Any]] = [
        lambda endpoint: endpoint.run({}, lambda _: None),
        lambda endpoint: endpoint.status("a"),
        lambda endpoint: endpoint.download(f"{address.url}/a.png"),
    ]
    for ask in asks:
        with pytest.raises(EndpointError, match="certificate is not trusted, or it does not speak"):
            asyncio.run(call(ask))


def test_a_name_that_is_not_found_is_told_with_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "TROUBLE_SECONDS", 0.1)

    async def call() -> None:
        async with Endpoint(Address("https://no-such-host.invalid/v2/a", KEY)) as endpoint:
            await endpoint.status("a")

    with pytest.raises(EndpointError, match="^no-such-host.invalid: "):
        asyncio.run(call())


@pytest.mark.parametrize("job_id", ["../run", "a/b", "", "a?b", "a\nb"])
def test_an_odd_id_does_not_lead_elsewhere(job_id: str, idle_endpoint: LocalEndpoint) -> None:
    before = len(idle_endpoint.record.exchanges)
    with pytest.raises(EndpointError, match="an id that cannot be asked for"):
        at(idle_endpoint, lambda endpoint: endpoint.status(job_id))
    assert len(idle_endpoint.record.exchanges) == before


def test_cancelled_while_the_job_is_on_its_way_its_id_is_still_learnt(
    idle_endpoint: LocalEndpoint,
) -> None:
    idle_endpoint.faults.delay("run", 1)
    taken: list[str] = []

    async def call(endpoint: Endpoint) -> None:
        sending = asyncio.ensure_future(endpoint.run({"prompt": "a"}, taken.append))
        await asyncio.sleep(0.3)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    at(idle_endpoint, call)
    assert taken == [job.id for job in idle_endpoint.jobs]
    assert len(taken) == 1


# Servers of the tests' own.

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def server(
    answer: Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], bytes]],
) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, headers, body = answer(self)
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("location", ["http://[bad", "http://a\u202e\x1b[2J/", ""])
def test_a_redirect_to_nowhere_is_told(location: str) -> None:
    async def call(url: str) -> None:
        async with Endpoint(Address(url, KEY)) as endpoint:
            await endpoint.status("a")

    header = {"Location": location.encode().decode("latin-1")}
    with (
        server(lambda _: (302, header, b"")) as url,
        pytest.raises(WrongEndpointError, match="redirects to .*, which was not followed"),
    ):
        asyncio.run(call(url))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_get_the_key(code: int, in_process: InProcess) -> None:
    asked: list[str] = []

    def note(request: BaseHTTPRequestHandler) -> Answer:
        asked.append(str(request.headers))
        return 200, {}, b'{"id": "a"}'

    with (
        server(note) as other,
        server(lambda _: (code, {"Location": f"{other}/v2/a/run"}, b"")) as first,
    ):
        env = environment(SDXL_ENDPOINT=f"{first}/v2/a", SDXL_API_KEY=KEY)
        done = in_process("draw", "x", env=env)
    assert done.returncode == 1
    assert "redirects to 127.0.0.1, which was not followed" in done.stderr
    assert asked == []
    assert KEY not in done.stderr + done.stdout


def answering(output: Any, job: dict[str, Any] | None = None) -> Callable[..., Any]:
    """An endpoint all of whose jobs are done, and a store of pictures."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if "/v2/" in request.path:
            base = f"http://{request.headers['Host']}"
            text = json.dumps(
                {"id": "job-1", "status": "COMPLETED", "output": output, **(job or {})}
            )
            return 200, {}, text.replace("STORE", base).encode()
        if request.headers.get("Authorization"):
            return 400, {}, b""  # the key is not for the store
        if "large" in request.path:
            return 200, {"Content-Length": str(2**40)}, file.getvalue()
        return (200, {}, file.getvalue()) if "red" in request.path else (403, {}, b"")

    return answer


def test_links_are_downloaded_without_the_key(in_process: InProcess, tmp_path: Path) -> None:
    output = {"images": ["STORE/red.png?signature=secret"], "seed": 3, "warning": "one of them"}
    with server(answering(output)) as url:
        env = environment(SDXL_ENDPOINT=f"{url}/v2/a", SDXL_API_KEY=KEY)
        saved = in_process("draw", "x", env=env)
        printed = in_process("draw", "x", "--links", env=env)
    assert saved.stdout == "x-seed3.png\n", saved.stderr
    assert Image.open(tmp_path / "x-seed3.png").getpixel((0, 0)) == (255, 0, 0)
    assert "Warning: one of them" in saved.stderr
    assert printed.stdout == f"{url}/red.png?signature=secret\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x-seed3.png"]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({"images": ["STORE/none.png?signature=secret"]}, "/none.png: the storage answered 403"),
        ({"images": ["file:///etc/passwd"]}, "file:///etc/passwd: is no http or https address"),
        ({"images": ["http://"]}, "http://: is no address that can be asked"),
        ({"images": ["http://[::1"]}, "http://[::1: is no address that can be asked"),
        ({"images": ["data:image/png;base64,AAAA"]}, "what came as picture 1: it is no PNG"),
        ({"images": ["data:image/png;base64,!"]}, "broken base64"),
        ({"images": [7]}, "something else than pictures"),
        (None, "there is no output"),
        ("text", "there is no output"),
        ({"error": "height: must be\nwidth: must be"}, "sdxl: --height: must be\n--width: must be"),
    ],
)
def test_an_answer_without_pictures_is_told(
    output: Any, told: str, in_process: InProcess, tmp_path: Path
) -> None:
    with server(answering(output)) as url:
        env = environment(SDXL_ENDPOINT=f"{url}/v2/a", SDXL_API_KEY=KEY)
        done = in_process("draw", "x", env=env)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pictures_before_a_broken_one_are_saved_and_told(
    in_process: InProcess, tmp_path: Path
) -> None:
    with server(answering({"images": ["STORE/red.png", "STORE/none.png"], "seed": 3})) as url:
        done = in_process("draw", "x", env=environment(SDXL_ENDPOINT=f"{url}/v2/a"))
    assert done.returncode == 1
    assert "picture 2: " in done.stderr
    assert done.stderr.endswith("\nsaved: x-seed3.png\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x-seed3.png"]


def test_a_crash_of_the_worker_is_told_without_its_traceback(in_process: InProcess) -> None:
    error = json.dumps(
        {
            "error_type": "<class 'ValueError'>",
            "error_message": "no such thing",
            "error_traceback": "Traceback (most recent call last): /secret/place",
        }
    )
    with server(answering(None, {"status": "FAILED", "error": error})) as url:
        env = environment(SDXL_ENDPOINT=f"{url}/v2/a", SDXL_API_KEY=KEY)
        done = in_process("draw", "x", env=env)
    assert done.stderr.splitlines()[-1] == "sdxl: the worker failed (ValueError): no such thing"


def test_a_picture_at_a_link_may_not_be_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_PICTURE_BYTES", 10)

    async def call(url: str) -> None:
        async with Endpoint(Address(url, KEY)) as endpoint:
            await endpoint.download(f"{url}/red.png")

    with server(answering(None)) as url, pytest.raises(EndpointError, match="is larger than"):
        asyncio.run(call(url))
