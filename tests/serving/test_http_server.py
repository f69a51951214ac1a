"""The worker's own HTTP server: real processes on the miniature model, and the official clients'
way to use it."""

import asyncio
import base64
import collections
import io
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from sdxl_worker.serving import ending, http_server, ports
from sdxl_worker.serving.answering import Answer, Outcome
from sdxl_worker.serving.http_server import WorkerServer
from sdxl_worker.settings import Settings
from tests.http_worker import LONG, QUICK, HttpWorker, free_port, http_worker, wait_for
from tests.support import PROMPT, REPOSITORY, decoded, picture, run

KEYS = "first-key, second-key"
QUEUE_LIMIT = 20
MB = 10**6


@pytest.fixture(autouse=True)
def no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in this process that is told to end hurries the waits of all later tests."""
    monkeypatch.setattr(ending, "_ends_at", None)


@pytest.fixture(scope="module")
def health_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, health_port: int) -> Iterator[HttpWorker]:
    """One job at a time."""
    with http_worker(
        tmp_path_factory.mktemp("worker"),
        API_KEY=KEYS,
        QUEUE_LIMIT=str(QUEUE_LIMIT),
        PORT_HEALTH=str(health_port),
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def client(worker: HttpWorker) -> Iterator[httpx.Client]:
    with worker.client() as client:
        yield client


def drawn(response: httpx.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    return decoded(response.json()["images"][0])


class TestGenerate:
    @pytest.mark.parametrize("body", [{"input": {**QUICK, "seed": 4}}, {**QUICK, "seed": 4}])
    def test_the_answer_is_the_handler_s_output(
        self, body: dict[str, Any], client: httpx.Client
    ) -> None:
        response = client.post("/generate", json=body)
        assert response.headers["content-type"] == "application/json"
        assert list(response.json()) == ["images", "image_url", "seed"]
        assert drawn(response).tobytes() == picture(**QUICK, seed=4).tobytes()

    def test_a_job_is_in_the_log_under_the_answer_s_id_and_its_prompt_is_not(
        self, worker: HttpWorker
    ) -> None:
        job_id = worker.generate(**QUICK).headers["x-job-id"]
        lines = [line for line in worker.log().splitlines() if job_id in line]
        assert [
            re.search(r"generate done|encode done|answered with 200", line)[0]  # type: ignore[index]
            for line in lines
        ] == ["generate done", "encode done", "answered with 200"]
        assert PROMPT not in worker.log()

    def test_a_caller_s_mistake_is_400_in_the_handler_s_words(self, worker: HttpWorker) -> None:
        response = worker.generate(height=65)
        assert response.status_code == 400
        assert response.json() == run({"height": 65})

    @pytest.mark.parametrize(
        ("body", "told"),
        [
            (b"", "the body is not valid JSON: "),
            (b"{", "the body is not valid JSON: "),
            (b"\xff", "the body must be JSON in UTF-8"),
            (b"[" * 100_000, "the body is nested too deeply"),
            (b"1" * 5000, "the body must be JSON in UTF-8, with no number of thousands of digits"),
            (b"[]", "the body must be a JSON object; got []"),
            (b'{"input": {}, "webhook": "https://a"}', '"webhook": no such field beside input'),
            (b'{"input": 3}', "input: must be an object with a prompt in it; got 3"),
            (b"{}", "prompt: required"),
            (b'{"input": {"prompt": "a"}, "s3Config": 1}', "s3Config: must be an object with"),
        ],
    )
    def test_a_body_that_is_no_job_is_400(
        self, body: bytes, told: str, client: httpx.Client
    ) -> None:
        response = client.post("/generate", content=body)
        assert response.status_code == 400
        assert response.json()["error"].startswith(told)

    def test_what_java_s_client_does_to_the_body_is_told(self, client: httpx.Client) -> None:
        headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": ""}
        response = client.post("/generate", json=QUICK, headers=headers)
        assert response.status_code == 400
        assert "(Upgrade); send HTTP/1.1 alone" in response.json()["error"]

    def test_many_requests_go_over_one_connection(self, worker: HttpWorker) -> None:
        host, port = worker.url.removeprefix("http://").split(":")
        request = f"GET /ping HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            for _ in range(5):
                connection.sendall(request)
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK")


class TestRoutes:
    @pytest.mark.parametrize("path", ["/", "/nothing", "/docs", "/openapi.json", "/generate/"])
    def test_an_unknown_one_is_404(self, path: str, client: httpx.Client) -> None:
        response = client.get(path)
        assert response.status_code == 404
        assert response.json() == {"error": "there is no such route"}

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [("GET", "/generate", "POST"), ("POST", "/metrics", "GET"), ("PUT", "/ping", "GET")],
    )
    def test_a_wrong_method_is_405(
        self, method: str, path: str, allowed: str, client: httpx.Client
    ) -> None:
        response = client.request(method, path)
        assert response.status_code == 405
        assert response.json() == {"error": f"this route does not take {method}"}
        assert allowed in response.headers["allow"]

    def test_under_v1_errors_have_openai_s_form(self, client: httpx.Client) -> None:
        for response in (client.get("/v1/nothing"), client.get("/v1/images/edits")):
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"


class TestKey:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/generate"),
            ("POST", "/v1/images/generations"),
            ("POST", "/v1/images/edits"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/nothing"),
        ],
    )
    def test_all_but_ping_need_it(self, method: str, path: str, worker: HttpWorker) -> None:
        response = httpx.request(method, worker.url + path, json=QUICK, timeout=60)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        message = error["message"] if path.startswith("/v1/") else error
        assert message == "the API key is missing or wrong; send Authorization: Bearer KEY"
        assert httpx.get(worker.url + "/ping").status_code == 200

    @pytest.mark.parametrize(
        ("header", "status"),
        [
            ("Bearer first-key", 200),
            ("bearer second-key", 200),
            ("Bearer first-key, second-key", 401),
            ("Bearer first-ke", 401),
            ("Bearer first-keys", 401),
            ("Bearer", 401),
            ("first-key", 401),
            ("Basic first-key", 401),
            (b"Bearer \xfcber", 401),
        ],
    )
    def test_each_of_them_opens_and_nothing_else(
        self, header: str | bytes, status: int, worker: HttpWorker
    ) -> None:
        value = header if isinstance(header, bytes) else header.encode()
        response = httpx.get(worker.url + "/metrics", headers=[(b"Authorization", value)])
        assert response.status_code == status
        assert "-key" not in worker.log()


class TestLargeBodies:
    def zeros(self, size: int) -> Iterator[bytes]:
        for _ in range(size // MB):
            yield b"0" * MB

    def test_one_of_31_mb_is_413(self, client: httpx.Client) -> None:
        response = client.post("/generate", content=b"0" * 31 * MB)
        assert response.status_code == 413
        assert response.json()["error"].startswith("the body is over 30 MB; send pictures as links")

    def test_one_of_29_mb_is_read(self, client: httpx.Client) -> None:
        response = client.post("/generate", content=b"[" + b" " * 29 * MB + b"]")
        assert (response.status_code, response.json()["error"]) == (
            400,
            "the body must be a JSON object; got []",
        )

    def test_an_endless_one_is_413_and_is_not_held_in_memory(
        self, client: httpx.Client, worker: HttpWorker
    ) -> None:
        process = psutil.Process(worker.process.pid)
        before, most, done = process.memory_info().rss, 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.01):
                most = max(most, process.memory_info().rss)

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            response = client.post("/generate", content=self.zeros(400 * MB))
        finally:
            done.set()
            watching.join()
        assert response.status_code == 413
        assert most - before < 150 * MB


class TestHangingUp:
    def stopped(self, worker: HttpWorker) -> float:
        return worker.metrics()['sdxl_jobs_total{outcome="stopped"}']

    def running(self, worker: HttpWorker) -> float:
        return worker.metrics()["sdxl_jobs_running"]

    def waiting(self, worker: HttpWorker) -> float:
        return worker.metrics()["sdxl_jobs_waiting"]

    def open_request(self, worker: HttpWorker, **job_input: Any) -> socket.socket:
        """A client that has sent a job, and waits."""
        host, port = worker.url.removeprefix("http://").split(":")
        body = json.dumps(job_input).encode()
        connection = socket.create_connection((host, int(port)))
        head = f"POST /generate HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {worker.key}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def test_stops_the_job_within_a_step_and_frees_its_place(self, worker: HttpWorker) -> None:
        before, told = self.stopped(worker), worker.log().count("the client hung up")
        connection = self.open_request(worker, **LONG)
        wait_for(lambda: self.running(worker) == 1)
        connection.close()
        wait_for(lambda: self.running(worker) == 0)
        assert self.stopped(worker) == before + 1
        assert worker.log().count("the client hung up") == told + 1
        # Another job can only be drawn once it has left the GPU's thread.
        assert worker.generate(**QUICK, seed=2).status_code == 200
        hung_up = re.findall(r"(\S+) \| the client hung up", worker.log())[-1]
        assert f"{hung_up} | stopped" in worker.log()
        assert f"{hung_up} | generate done" not in worker.log()

    def test_meanwhile_a_wrong_request_is_refused_at_once_not_at_its_turn(
        self, worker: HttpWorker
    ) -> None:
        """Whichever route it takes, and it is counted."""
        refused = 'sdxl_jobs_total{outcome="refused"}'
        before = worker.metrics()[refused]
        running = self.open_request(worker, **LONG)
        wait_for(lambda: self.running(worker) == 1)
        with worker.client() as client:
            answers = [
                client.post("/generate", json={"prompt": "a", "height": 65}),
                client.post("/generate", json={"prompt": "a", "num_inference_steps": 1001}),
                client.post("/v1/images/generations", json={"prompt": "a", "n": 99}),
            ]
        assert self.running(worker) == 1, "or they have waited for its end"
        assert [answer.status_code for answer in answers] == [400] * 3
        assert answers[0].json() == run({"prompt": "a", "height": 65})
        assert answers[2].json()["error"]["type"] == "invalid_request_error"
        assert worker.metrics()[refused] == before + 3
        job_id = answers[0].headers["x-job-id"]
        assert f"{job_id} | refused" in worker.log()
        running.close()
        wait_for(lambda: self.running(worker) == 0)

    def test_stops_a_job_that_waits_and_never_begins_it(self, worker: HttpWorker) -> None:
        before = self.stopped(worker)
        first = self.open_request(worker, **LONG)
        wait_for(lambda: self.running(worker) == 1)
        second = self.open_request(worker, **QUICK)
        wait_for(lambda: self.waiting(worker) == 1)
        second.close()
        wait_for(lambda: self.waiting(worker) == 0)
        assert self.running(worker) == 1, "the other one goes on"
        assert self.stopped(worker) == before + 1
        hung_up = re.findall(r"(\S+) \| the client hung up", worker.log())[-1]
        first.close()
        wait_for(lambda: self.running(worker) == 0)
        assert f"{hung_up} | generate" not in worker.log()

    def test_in_the_middle_of_the_body_takes_no_place(self, worker: HttpWorker) -> None:
        host, port = worker.url.removeprefix("http://").split(":")
        head = f"POST /generate HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {worker.key}\r\n"
        for _ in range(QUEUE_LIMIT + 5):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        wait_for(lambda: worker.generate(**QUICK).status_code == 200)
        assert "Traceback" not in worker.log()


def test_ping_answers_while_a_job_is_drawn(worker: HttpWorker, client: httpx.Client) -> None:
    with ThreadPoolExecutor() as threads:
        job = threads.submit(worker.generate, **{**LONG, "num_images": 2})
        wait_for(lambda: worker.metrics()["sdxl_jobs_running"] == 1)
        assert [client.get("/ping").status_code for _ in range(10)] == [200] * 10
        assert client.head("/ping").status_code == 200
        assert not job.done()
        assert job.result().status_code == 200


def test_the_health_port_has_ping_alone(worker: HttpWorker, health_port: int) -> None:
    url = worker.url.rpartition(":")[0] + f":{health_port}"
    assert httpx.get(f"{url}/ping").status_code == 200
    headers = {"Authorization": f"Bearer {worker.key}"}
    response = httpx.post(f"{url}/generate", json=QUICK, headers=headers)
    assert response.status_code == 404
    assert response.json() == {"error": "there is only /ping at this port"}


def test_of_100_at_once_each_is_drawn_or_told_when_to_come_again(worker: HttpWorker) -> None:
    before = worker.metrics()

    async def ask(client: httpx.AsyncClient, seed: int) -> httpx.Response:
        return await client.post("/generate", json={**QUICK, "seed": seed})

    async def ask_all() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {worker.key}"}
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(
            base_url=worker.url, headers=headers, timeout=300, limits=limits
        ) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(100)))

    answers = asyncio.run(ask_all())
    counts = collections.Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= QUEUE_LIMIT + 1
    for seed, answer in enumerate(answers):
        if answer.status_code == 200:
            assert drawn(answer).tobytes() == picture(**QUICK, seed=seed).tobytes()
        else:
            seconds = int(answer.headers["retry-after"])
            assert 1 <= seconds <= 300
            told = f"too many jobs wait; try again in {seconds} seconds"
            assert answer.json() == {"error": told}
    after = worker.metrics()
    for outcome, status in (("done", 200), ("turned_away", 429)):
        name = f'sdxl_jobs_total{{outcome="{outcome}"}}'
        assert after[name] - before[name] == counts[status]
    assert after["sdxl_jobs_running"] == after["sdxl_jobs_waiting"] == 0


# Starting and ending. Each in a process of its own.


def test_from_its_start_to_a_drained_end(tmp_path: Path) -> None:
    """204 and 503 while the models load, 200, and 503 while the last jobs are answered."""
    with http_worker(tmp_path) as worker, ThreadPoolExecutor() as threads:
        wait_for(worker.listens)
        assert worker.ping() == 204
        refused = worker.generate(**QUICK)
        assert refused.status_code == 503
        assert refused.json() == {"error": "the models are being loaded; try again"}
        assert int(refused.headers["retry-after"]) > 0
        assert worker.metrics()["sdxl_model_loaded"] == 0
        worker.wait_until_ready()
        assert worker.metrics()["sdxl_model_loaded"] == 1
        assert "API_KEY is not set: whoever reaches port" in worker.log()

        running = threads.submit(worker.generate, **{**LONG, "num_images": 3, "seed": 1})
        wait_for(lambda: worker.metrics()["sdxl_jobs_running"] == 1)
        waiting = threads.submit(worker.generate, **QUICK, seed=2)
        wait_for(lambda: worker.metrics()["sdxl_jobs_waiting"] == 1)
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: worker.ping() == 503)
        refused = worker.generate(**QUICK)
        assert refused.status_code == 503
        assert refused.json() == {"error": "the worker was told to end; send the job again"}
        assert int(refused.headers["retry-after"]) > 0
        assert not running.done()
        assert len(running.result().json()["images"]) == 3
        assert drawn(waiting.result()).tobytes() == picture(**QUICK, seed=2).tobytes()
        assert worker.exit_status() == 0
        assert "Traceback" not in worker.log()


def test_told_to_end_while_the_models_load_it_ends_at_once(tmp_path: Path) -> None:
    with http_worker(tmp_path) as worker:
        wait_for(worker.listens)
        worker.process.send_signal(signal.SIGINT)
        assert worker.exit_status() == 0
        assert "ready" not in worker.log()
        assert "Traceback" not in worker.log()


def test_told_twice_it_ends_at_once(tmp_path: Path) -> None:
    with http_worker(tmp_path) as worker, ThreadPoolExecutor() as threads:
        worker.wait_until_ready()
        job = threads.submit(worker.generate, **LONG)
        wait_for(lambda: worker.metrics()["sdxl_jobs_running"] == 1)
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: worker.ping() == 503)
        worker.process.send_signal(signal.SIGINT)
        assert worker.exit_status() == 128 + signal.SIGINT
        assert isinstance(job.exception(), httpx.TransportError)


# A job with this prompt does to the worker what an illegal memory access does.
BREAKING = """
from sdxl_worker import gpu
from sdxl_worker.drawing import generate as drawing
draw = drawing.generate
def generate(request, *arguments, **options):
    if request.prompt == "break":
        gpu.is_broken = lambda: True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return draw(request, *arguments, **options)
drawing.generate = generate
import handler
handler.main()
"""


def test_with_a_broken_gpu_the_process_ends_after_the_answers(tmp_path: Path) -> None:
    with http_worker(tmp_path, script=BREAKING) as worker, ThreadPoolExecutor() as threads:
        worker.wait_until_ready()
        first = threads.submit(worker.generate, **{**LONG, "num_images": 1})
        wait_for(lambda: worker.metrics()["sdxl_jobs_running"] == 1)
        breaking = threads.submit(worker.generate, **{**QUICK, "prompt": "break"})
        wait_for(lambda: worker.metrics()["sdxl_jobs_waiting"] == 1)
        waiting = threads.submit(worker.generate, **QUICK)
        wait_for(lambda: worker.metrics()["sdxl_jobs_waiting"] == 2)
        assert first.result().status_code == 200
        told = "the worker's GPU failed and the worker is being replaced; send the job again"
        for answer in (breaking.result(), waiting.result()):
            assert answer.status_code == 503
            assert answer.json() == {"error": told}
        assert worker.exit_status() == 1


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"MODEL_DIR": "/nowhere"}, "MODEL_DIR"),
        ({"PORT": "70000"}, "PORT: must be an integer from 1 to 65535"),
        ({"API_KEY": "a key"}, "API_KEY: must be a key, or several with commas between them"),
        ({"PORT_HEALTH": "taken"}, "PORT_HEALTH: {port} cannot be used: Address already in use"),
    ],
)
def test_a_worker_that_cannot_start_says_why_and_ends(
    variables: dict[str, str], told: str, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {name: value.replace("taken", port) for name, value in variables.items()}
        with http_worker(tmp_path, **variables) as worker:
            assert worker.exit_status() == 1
    last = worker.log().splitlines()[-1]
    assert last.startswith("The worker cannot start. ")
    assert told.format(port=port) in last


# The server in this process, with answers that no model is needed for.


class Served:
    """A server and what its jobs are answered with."""

    def __init__(self, *answers: Answer, **settings: Any) -> None:
        self.answers = itertools.cycle(answers)
        self.jobs: list[dict[str, Any]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        models: Future[None] = Future()
        models.set_result(None)
        self.server = WorkerServer(self.answer, Settings(**settings), models)
        transport = httpx.ASGITransport(self.server.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://worker")

    async def answer(self, job: dict[str, Any]) -> Answer:
        self.jobs.append(job)
        await self.may_answer.wait()
        return next(self.answers)

    async def post(self, path: str = "/generate", **options: Any) -> httpx.Response:
        await self.server.wait_for_models()
        return await self.client.post(path, **{"json": {"prompt": "a"}, **options})


DONE = Answer({"images": ["data:image/png;base64,aGk="], "seed": 1}, Outcome.DONE)


@pytest.mark.parametrize(
    ("outcome", "status", "kind", "should_retry"),
    [
        (Outcome.REFUSED, 400, "invalid_request_error", None),
        (Outcome.STOPPED, 503, "server_error", None),
        (Outcome.NO_MODEL, 503, "server_error", None),
        (Outcome.NO_PICTURE, 500, "server_error", "false"),
        (Outcome.OUT_OF_MEMORY, 503, "server_error", "false"),
        (Outcome.GPU_BROKEN, 503, "server_error", None),
        (Outcome.FAILED, 500, "server_error", "false"),
    ],
)
def test_each_failure_has_its_status_and_one_string(
    outcome: Outcome, status: int, kind: str, should_retry: str | None
) -> None:
    """And OpenAI's clients are told where another try would be in vain."""

    async def ask() -> None:
        failure = Answer({"error": "so it is", "refresh_worker": True}, outcome)
        for path in ("/generate", "/v1/images/generations", "/v1/images/edits"):
            response = await Served(failure).post(path)
            assert response.status_code == status
            assert response.headers.get("x-should-retry") == should_retry
            assert ("Retry-After" in response.headers) is (outcome is Outcome.STOPPED)
            told = {"message": "so it is", "type": kind, "param": None, "code": None}
            assert response.json() == {"error": told if path.startswith("/v1/") else "so it is"}

    asyncio.run(ask())


def test_after_a_broken_gpu_ping_says_so_and_no_job_is_let_in() -> None:
    async def ask() -> None:
        served = Served(Answer({"error": "broken", "refresh_worker": True}, Outcome.GPU_BROKEN))
        is_broken = asyncio.Event()

        async def body() -> Any:
            await is_broken.wait()
            yield b"{}"

        late = asyncio.create_task(served.post(json=None, content=body()))
        while not served.server._places.taken:
            await asyncio.sleep(0.01)
        assert (await served.post()).status_code == 503
        is_broken.set()
        assert (await late).status_code == 503
        assert (await served.client.get("/ping")).status_code == 503
        assert (await served.post()).status_code == 503
        assert len(served.jobs) == 1

    asyncio.run(ask())


def test_what_is_not_answered_in_time_is_given_up_when_the_worker_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "ANSWERED_WITHIN_SECONDS", 0.1)

    async def ask() -> None:
        served = Served(DONE)
        served.may_answer.clear()
        asking = asyncio.create_task(served.post())
        while not served.jobs:
            await asyncio.sleep(0.01)
        served.server.told_to_end()
        response = await asking
        assert response.status_code == 503
        assert response.json() == {"error": "the worker was told to end; send the job again"}
        while not served.server.server.should_exit:
            await asyncio.sleep(0.01)

    asyncio.run(ask())


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_worker.serving.http_bodies.READ_TIMEOUT_SECONDS", 0.1)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    async def ask() -> None:
        served = Served(DONE)
        response = await served.post(json=None, content=slow())
        assert response.status_code == 408
        assert (await served.post()).status_code == 200

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("requests", "closes"),
    [
        (b"", True),
        (b"GET /ping HTTP/1.1\r\nHost: ", True),
        (b"GET /ping HTTP/1.1\r\n\r\nGET /ping HT", True),
        (b"GET /ping HTTP/1.1\r\n\r\n", False),
    ],
)
def test_a_client_that_does_not_finish_a_request_s_head_is_dropped(
    requests: bytes, closes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real connection; an idle one stays for the next request."""
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.2)

    async def ask() -> None:
        server = Served(DONE).server.server
        [listening] = ports.open_ports(Settings(port=free_port()))
        port = listening.getsockname()[1]
        serving = asyncio.create_task(server.serve([listening]))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(requests)
        if closes:
            async with asyncio.timeout(60):
                await reader.read()
        else:
            assert b" 204 " in await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.6)
            writer.write(requests)
            assert b" 204 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        server.should_exit = True
        await serving

    asyncio.run(ask())


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /ping HTTP/1.1\r\n",
        b"GET /ping HTTP/1.1\r\nX: ",
        b"GET /",
        b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
)
def test_a_head_without_an_end_is_refused_and_not_kept(begin: bytes) -> None:
    """Nor are the headers that may follow a body in chunks."""

    async def ask() -> None:
        server = Served(DONE, api_key="key").server.server
        [listening] = ports.open_ports(Settings(port=free_port()))
        serving = asyncio.create_task(server.serve([listening]))
        _, writer = await asyncio.open_connection("127.0.0.1", listening.getsockname()[1])
        writer.write(begin)
        line = b"a" * 10_000
        if begin.endswith(b"\n"):
            line = b"X: " + line + b"\r\n"

        async def send_20_mb() -> None:
            for _ in range(2000):
                writer.write(line)
                await writer.drain()

        with pytest.raises(ConnectionError):
            await send_20_mb()
        writer.close()
        server.should_exit = True
        await serving

    asyncio.run(ask())


def test_large_bodies_and_many_requests_are_no_large_head() -> None:
    async def ask() -> None:
        served = Served(DONE)
        server = served.server.server
        await served.server.wait_for_models()
        [listening] = ports.open_ports(Settings(port=free_port()))
        serving = asyncio.create_task(server.serve([listening]))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/generate"

        async def chunks() -> Any:
            yield b'{"prompt": "'
            for _ in range(300):
                yield b"a" * 10_000
            yield b'"}'

        async with httpx.AsyncClient() as client:
            for _ in range(3):
                assert (await client.post(url, content=chunks())).status_code == 200
                long = {"prompt": "a" * MB}
                headers = {"X": "a" * 30_000}
                assert (await client.post(url, json=long, headers=headers)).status_code == 200
        server.should_exit = True
        await serving

    asyncio.run(ask())


def test_a_body_that_is_answered_already_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "KEEP_ALIVE_SECONDS", 0.5)

    async def ask() -> None:
        server = Served(DONE, api_key="key").server.server
        [listening] = ports.open_ports(Settings(port=free_port()))
        serving = asyncio.create_task(server.serve([listening]))
        address = "127.0.0.1", listening.getsockname()[1]
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST /generate HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
        assert b" 401 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"{")
        async with asyncio.timeout(60):
            await reader.read()
        writer.close()
        server.should_exit = True
        await serving

    asyncio.run(ask())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has TCP_USER_TIMEOUT")
def test_a_client_that_takes_nothing_of_its_answer_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "STUCK_MILLISECONDS", 500)

    async def ask() -> None:
        large = Answer({"images": ["x" * 30 * MB], "seed": 1}, Outcome.DONE)
        worker = Served(large).server
        [listening] = ports.open_ports(Settings(port=free_port()))
        await worker.wait_for_models()
        serving = asyncio.create_task(worker.server.serve([listening]))
        with socket.create_connection(("127.0.0.1", listening.getsockname()[1])) as client:
            client.sendall(b"POST /generate HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
            connections = worker.server.server_state.connections
            async with asyncio.timeout(60):
                while not connections:
                    await asyncio.sleep(0.02)
                while connections:
                    await asyncio.sleep(0.02)
        worker.server.should_exit = True
        await serving

    asyncio.run(ask())


def test_a_form_becomes_the_json_that_says_the_same() -> None:
    picture_bytes = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture_bytes, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(picture_bytes.getvalue()).decode()

    async def ask() -> None:
        served = Served(DONE)
        png = ("a.png", picture_bytes.getvalue(), "image/png")
        form = {"data": {"prompt": "a", "n": "2"}, "json": None}
        await served.post("/v1/images/edits", files=[("image", png), ("mask", png)], **form)
        await served.post("/v1/images/edits", files=[("image[]", png)], **form)
        await served.post("/v1/images/edits", files=[("image", png), ("image", png)], **form)
        await served.post("/v1/images/edits", files=[("image[]", png), ("image", png)], **form)
        await served.post("/v1/images/edits", json={"prompt": "a", "image": uri})
        inputs = [job["input"] for job in served.jobs]
        assert {one["openai_route"] for one in inputs} == {"/v1/images/edits"}
        texts = {"prompt": "a", "n": "2"}
        assert [one["openai_input"] for one in inputs] == [
            {**texts, "image": uri, "mask": uri},
            {**texts, "image": [uri]},
            {**texts, "image": [uri, uri]},
            {**texts, "image": [uri, uri]},
            {"prompt": "a", "image": uri},
        ]
        headers = {"Content-Type": "multipart/form-data"}
        broken = await served.post("/v1/images/edits", json=None, content=b"x", headers=headers)
        assert broken.status_code == 400
        assert broken.json()["error"]["message"].startswith("the form cannot be read: ")
        headers = {"Content-Type": "Multipart/Form-Data; Boundary=x"}
        cut_off = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat and a'
        broken = await served.post("/v1/images/edits", json=None, content=cut_off, headers=headers)
        assert broken.status_code == 400
        assert "its end is missing" in broken.text
        whole = cut_off + b" dog\r\n--x--"
        await served.post("/v1/images/edits", json=None, content=whole, headers=headers)
        assert served.jobs[-1]["input"]["openai_input"] == {"prompt": "a cat and a dog"}

    asyncio.run(ask())


def test_a_body_that_no_request_looks_like_does_not_wait() -> None:
    """In memory, empty lists take some thirty times their text."""

    async def ask() -> None:
        served = Served(DONE)
        body = {"input": {"prompt": "a", "loras": [[]] * 2000}}
        for path in ("/generate", "/v1/images/generations", "/v1/images/edits"):
            response = await served.post(path, json=body)
            assert response.status_code == 400
            assert "must hold at most 1000 values" in response.text
        assert served.jobs == []

    asyncio.run(ask())


def test_a_body_of_millions_of_values_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading it takes seconds, in which nothing else is answered."""

    async def ask() -> None:
        served = Served(DONE)
        wordy = {"prompt": "," * 20_000, "negative_prompt": "[" * 20_000}
        assert (await served.post(json=wordy)).status_code == 200
        monkeypatch.setattr("sdxl_worker.serving.http_bodies.json.loads", None)
        for values in (b"0,", b"[],", b'{"a":[', b"[" * 3):
            for path in ("/generate", "/v1/images/generations", "/v1/images/edits"):
                response = await served.post(path, json=None, content=values * 200_001)
                assert response.status_code == 400
                assert "more values in it than any request" in response.text

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("site", "settings", "is_on_runpod", "status"),
    [
        ("cross-site", {}, False, 403),
        ("cross-site", {"api_key": "a-key"}, False, 200),
        ("cross-site", {}, True, 200),
        ("same-origin", {}, False, 200),
        ("none", {}, False, 200),
    ],
)
def test_pages_of_other_sites_do_not_use_a_worker_without_a_key(
    site: str,
    settings: dict[str, Any],
    is_on_runpod: bool,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_on_runpod:
        monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "an-endpoint")

    async def ask() -> None:
        served = Served(DONE, **settings)
        headers = {"Sec-Fetch-Site": site, "Authorization": "Bearer a-key"}
        assert (await served.post(headers=headers)).status_code == status
        assert len(served.jobs) == (status == 200)
        assert (await served.client.get("/ping", headers=headers)).status_code == 200

    asyncio.run(ask())


def test_an_answer_of_30_mb_arrives_whole() -> None:
    async def ask() -> None:
        output = {"images": ["data:image/png;base64," + "A" * 29_990_000], "seed": 1}
        response = await Served(Answer(output, Outcome.DONE)).post()
        assert response.status_code == 200
        assert response.json() == output

    asyncio.run(ask())


def test_the_models_route_waits_for_nobody() -> None:
    async def ask() -> None:
        models = Answer({"object": "list", "data": []}, Outcome.DONE)
        served = Served(models, queue_limit=0)
        await served.server.wait_for_models()
        with served.server._places.entered():
            response = await served.client.get("/v1/models")
        assert response.json() == {"object": "list", "data": []}
        assert [job["input"] for job in served.jobs] == [{"openai_route": "/v1/models"}]

    asyncio.run(ask())


def test_a_port_below_1024_or_taken_is_told() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ports.ModelError, match=f"PORT: {port} cannot be used: Address already"):
            ports.open_ports(Settings(port=port))


def test_health_at_the_same_port_opens_one() -> None:
    port = free_port()
    [opened] = ports.open_ports(Settings(port=port, port_health=port))
    opened.close()


def test_the_queue_s_worker_has_nothing_of_it() -> None:
    script = (
        "import sys, runpod, handler, sdxl_worker.serving.scaler\n"
        "ours = {name for name in sys.modules if name.startswith(('prometheus', 'uvicorn'))}\n"
        "assert not ours & {'prometheus_client'}, ours\n"
        "assert 'sdxl_worker.serving.http_server' not in sys.modules\n"
        "from sdxl_worker.serving.logs import phase_listeners\n"
        "assert phase_listeners == []\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
