"""OpenAI's routes of the local endpoint, by hand: what becomes of a call on its way to a worker,
and of a job's end on its way back.
"""

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from local_endpoint import Fault, LocalEndpoint, Rules
from tests.local_endpoint.test_odd_requests import BAD_BODIES

BOUNDARY = "b0"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
MAX_BYTES = 4000
PREFIXES = ("/v2/ENDPOINT_ID/openai/v1", "/openai/v1")
MISTAKE = {"error_type": "invalid_request_error"}


@pytest.fixture(scope="module")
def bare() -> Iterator[LocalEndpoint]:
    """No worker: the tests do what workers do."""
    rules = Rules(
        poll_seconds=0.3,
        runsync_max_bytes=MAX_BYTES,
        execution_timeout_seconds=1,
        execution_timeout_min_seconds=0.1,
    )
    with LocalEndpoint(workers=0, rules=rules) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _no_job_is_left(bare: LocalEndpoint) -> Iterator[None]:
    yield
    bare.faults.clear()
    bare.with_queue(lambda queue: queue.purge())


class Call(threading.Thread):
    """One request, as a client of OpenAI's sends it, in a thread until it is answered."""

    def __init__(
        self,
        endpoint: LocalEndpoint,
        path: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        key: str = "YOUR_API_KEY",
    ) -> None:
        super().__init__(daemon=True)
        port = int(endpoint.url.split(":")[2].split("/")[0])
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        method = "GET" if body is None else "POST"
        headers = {"Authorization": f"Bearer {key}", "Content-Type": content_type}
        self.connection.request(method, path, body, headers)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(http.client.RemoteDisconnected):  # it has hung up
            response = self.connection.getresponse()
            self.status, self.headers = response.status, response.headers
            self.answer = json.loads(response.read())
        self.connection.close()

    def result(self) -> tuple[int, Any]:
        self.join(60)
        return self.status, self.answer

    def hang_up(self) -> None:
        assert self.connection.sock is not None
        self.connection.sock.shutdown(socket.SHUT_RDWR)


def eventually(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def take(endpoint: LocalEndpoint) -> dict[str, Any]:
    """The job, as a worker gets it."""

    def asked() -> Any:
        code, job = endpoint.call("job-take/hand?gpu=x&job_in_progress=0")
        return job if code == 200 else None

    return dict(eventually(asked))


def done(endpoint: LocalEndpoint, job: dict[str, Any], body: Any) -> None:
    endpoint.call(f"job-done/hand/{job['id']}?gpu=x&isStream=false", body)


def ended(
    endpoint: LocalEndpoint, body: Any, path: str = "/openai/v1/images/generations"
) -> tuple[int, Any]:
    """What a call is answered with whose job ends so."""
    call = Call(endpoint, path, b'{"prompt": "a"}')
    done(endpoint, take(endpoint), body)
    return call.result()


def form(*parts: tuple[str, bytes], end: str = "--") -> bytes:
    body = b""
    for head, content in parts:
        disposition = f"Content-Disposition: form-data; {head}"
        body += f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode() + content + b"\r\n"
    return body + f"--{BOUNDARY}{end}\r\n".encode()


def assert_openai_error(answer: tuple[int, Any], code: int, words: str = "") -> None:
    assert answer[0] == code, answer
    assert list(answer[1]) == ["error"]
    error = answer[1]["error"]
    kind = "invalid_request_error" if code < 500 else "server_error"
    assert (error["type"], error["param"], error["code"]) == (kind, None, None)
    assert words in error["message"]
    assert 0 < len(error["message"]) < 500


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("route", ["/images/generations", "/images/edits"])
def test_a_call_becomes_a_job_and_its_output_the_answer(
    bare: LocalEndpoint, prefix: str, route: str
) -> None:
    fields = {"prompt": "a", "n": 2, "seed": 2**60, "loras": [{"path": "x"}]}
    call = Call(bare, prefix + route, json.dumps(fields).encode())
    job = take(bare)
    assert job["id"].startswith("sync-"), "its answer may have 20 MB"
    assert job["input"] == {"openai_route": f"/v1{route}", "openai_input": fields}
    output = {"created": 1, "data": [{"b64_json": "a"}], "seed": 3}
    done(bare, job, {"output": output})
    assert call.result() == (200, output)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_models_are_asked_for_without_input(bare: LocalEndpoint, prefix: str) -> None:
    call = Call(bare, f"{prefix}/models")
    job = take(bare)
    assert job["input"] == {"openai_route": "/v1/models"}
    done(bare, job, {"output": {"object": "list", "data": []}})
    assert call.result() == (200, {"object": "list", "data": []})


def test_a_form_becomes_json(bare: LocalEndpoint) -> None:
    body = form(
        ('name="prompt"', "größer".encode()),
        ('name="n"', b"2"),
        ('name="image"; filename="a.png"\r\nContent-Type: image/png', b"\x89PNG\r\n\0\xff--b0"),
        ('name="mask"; filename="upload"', b"MASK"),
        ('name="upload_urls[]"', b"http://a"),
        ('name="loras"', b"one"),
        ('name="loras"', b"other"),
        ('name="empty"', b""),
        ('name="odd"; filename="x"\r\nContent-Type: a/b;base64,x', b"1"),
    )
    call = Call(bare, "/openai/v1/images/edits", body, FORM)
    job = take(bare)
    picture = base64.b64encode(b"\x89PNG\r\n\0\xff--b0").decode()
    assert job["input"]["openai_input"] == {
        "prompt": "größer",
        "n": "2",
        "image": f"data:image/png;base64,{picture}",
        "mask": "data:application/octet-stream;base64,TUFTSw==",
        "upload_urls": ["http://a"],
        "loras": ["one", "other"],
        "empty": "",
        "odd": "data:application/octet-stream;base64,MQ==",
    }
    done(bare, job, {"output": {}})
    call.result()


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_several_files_of_one_name_are_a_list(bare: LocalEndpoint, name: str) -> None:
    for count in (1, 2):
        parts = [(f'name="{name}"; filename="a.png"', b"1")] * count
        call = Call(bare, "/openai/v1/images/edits", form(*parts), FORM)
        job = take(bare)
        uri = "data:application/octet-stream;base64,MQ=="
        is_list = count > 1 or name.endswith("[]")
        expected = [uri] * count if is_list else uri
        assert job["input"]["openai_input"] == {"image": expected}
        done(bare, job, {"output": {"a": 1}})
        assert call.result()[0] == 200


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
        (b"nothing", FORM),
        (form(('name="a"', b"1"), end=""), FORM),
        (form(("x=1", b"1")), FORM),
        (form(('name="a"', b"\xff")), FORM),
        (form(('name="a"\r\nContent-Type: multipart/mixed; boundary=c', b"--c\r\n\r\n1")), FORM),
        (b"--b0\r\nno header\r\n\r\n1\r\n--b0--\r\n", FORM),
        (form(('name="a"', b"1")), "multipart/form-data"),
        (form(('name="a"', b"1")), "multipart/form-data; boundary=" + "x" * 100),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_refused(
    bare: LocalEndpoint, body: bytes, content_type: str
) -> None:
    for route in ("generations", "edits"):
        answer = Call(bare, f"/openai/v1/images/{route}", body, content_type).result()
        assert_openai_error(answer, 400)
    assert bare.with_queue(lambda queue: queue.health()["jobs"]["inQueue"]) == 0


@pytest.mark.parametrize("name", [name for name in BAD_BODIES if len(BAD_BODIES[name]) < MAX_BYTES])
def test_what_is_no_json_is_refused_as_on_our_own_routes(bare: LocalEndpoint, name: str) -> None:
    answer = Call(bare, "/openai/v1/images/generations", BAD_BODIES[name]).result()
    assert_openai_error(answer, 400)


def test_a_body_over_the_limit_is_refused(bare: LocalEndpoint) -> None:
    long = b"1" * (MAX_BYTES + 1)
    for body, content_type in (
        (json.dumps({"prompt": long.decode()}).encode(), "application/json"),
        (form(('name="image"; filename="a"', long)), FORM),
    ):
        answer = Call(bare, "/openai/v1/images/edits", body, content_type).result()
        assert_openai_error(answer, 413, f"at most {MAX_BYTES} are allowed")


def test_a_chunked_form_over_the_limit_is_refused_too(bare: LocalEndpoint) -> None:
    """It does not tell its length beforehand."""
    port = int(bare.url.split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    half = ('name="image"; filename="a"', b"1" * (MAX_BYTES * 3 // 4))
    body = iter([form(half, half)])
    headers = {"Authorization": "Bearer YOUR_API_KEY", "Content-Type": FORM}
    connection.request("POST", "/openai/v1/images/edits", body, headers, encode_chunked=True)
    response = connection.getresponse()
    assert_openai_error((response.status, json.loads(response.read())), 413)
    connection.close()


@pytest.mark.parametrize("key", ["wrong", "", "\xfc"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrong_key_is_answered_in_openai_s_form(
    bare: LocalEndpoint, prefix: str, key: str
) -> None:
    answer = Call(bare, f"{prefix}/models", key=key).result()
    assert_openai_error(answer, 401, "the API key is missing or wrong")


@pytest.mark.parametrize("path", ["/openai/v1/chat/completions", "/openai/v1/images/variations"])
def test_a_route_that_there_is_not_is_answered_so_too(bare: LocalEndpoint, path: str) -> None:
    assert_openai_error(Call(bare, path, b"{}").result(), 404)
    assert_openai_error(Call(bare, "/openai/v1/models", b"{}").result(), 405)


def test_the_caller_s_mistake_is_400_and_any_other_failure_500(bare: LocalEndpoint) -> None:
    answer = ended(bare, {"error": "n: must be 1\nsize: must be 2", "output": MISTAKE})
    assert_openai_error(answer, 400, "n: must be 1\nsize: must be 2")
    outputs: list[Any] = [..., {"images": []}, None, {"x": MISTAKE}]
    for output in outputs:
        body: dict[str, Any] = {"error": "no GPU"} | ({} if output is ... else {"output": output})
        assert_openai_error(ended(bare, body), 500, "no GPU")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "it was empty, or over 4000 bytes"),
        ({"output": {"data": "x" * MAX_BYTES}}, "it was empty, or over 4000 bytes"),
        ({"error": ["a list"], "output": {}}, ""),
    ],
)
def test_an_answer_that_got_lost_is_an_error(bare: LocalEndpoint, body: Any, words: str) -> None:
    answer = ended(bare, body)
    if words:
        assert_openai_error(answer, 500, words)
    else:
        assert answer == (200, {}), "the platform reads strings alone"


def test_a_job_that_is_cancelled_or_runs_too_long_is_an_error(bare: LocalEndpoint) -> None:
    call = Call(bare, "/openai/v1/images/generations", b"{}")
    bare.call(f"cancel/{take(bare)['id']}", method="POST")
    assert_openai_error(call.result(), 500, "the job was cancelled")
    call = Call(bare, "/openai/v1/images/generations", b"{}")
    take(bare)
    assert_openai_error(call.result(), 500)
    call = Call(bare, "/openai/v1/images/generations", b"{}")
    eventually(lambda: bare.call("health")[1]["jobs"]["inQueue"])
    bare.call("purge-queue", method="POST")
    assert_openai_error(call.result(), 500, "removed from it")


def test_clients_are_told_not_to_send_it_again_by_themselves(bare: LocalEndpoint) -> None:
    call = Call(bare, "/openai/v1/images/generations", b"{}")
    done(bare, take(bare), {"error": "no GPU"})
    assert call.result()[0] == 500
    assert call.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_client_that_hangs_up_cancels_its_job(bare: LocalEndpoint, is_taken: bool) -> None:
    call = Call(bare, "/openai/v1/images/generations", b"{}")
    job_id = take(bare)["id"] if is_taken else eventually(lambda: queued(bare))
    call.hang_up()
    assert bare.wait(job_id, timeout_seconds=30)["status"] == "CANCELLED"
    if is_taken:
        stops = eventually(lambda: bare.call("job-stop/hand?gpu=x")[1])
        assert job_id in stops["jobsToStop"]


def queued(endpoint: LocalEndpoint) -> str | None:
    waiting = [job.id for job in endpoint.jobs if not job.is_finished]
    return waiting[0] if waiting else None


def test_faults_reach_these_routes_as_they_are(bare: LocalEndpoint) -> None:
    bare.faults.add("openai", Fault("answer", status_code=429, body='"later"'))
    assert Call(bare, f"{PREFIXES[0]}/models").result() == (429, "later")


def test_our_own_routes_have_their_own_form_of_errors(bare: LocalEndpoint) -> None:
    assert bare.call("run", {"no": "input"})[1].keys() == {"error"}
    assert isinstance(bare.call("status/x")[1]["error"], str)
