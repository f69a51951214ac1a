"""The worker as an HTTP server: a load-balancing endpoint on Runpod, or a server of one's own.

The jobs are those of the queue, and so are their answers; docs/server.md has routes and statuses.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from enum import Enum
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sdxl_worker.host_memory import give_back_host_memory
from sdxl_worker.openai_images import EDITS, GENERATIONS, MODELS
from sdxl_worker.serving.answering import (
    GPU_FAILED,
    INVALID_REQUEST,
    Answer,
    Answering,
    Outcome,
    refusal,
)
from sdxl_worker.serving.ending import HURRIED_SECONDS, hurry
from sdxl_worker.serving.http_bodies import (
    Refusal,
    job_of,
    read_body,
    read_form_or_object,
    read_object,
)
from sdxl_worker.serving.metrics import TURNED_AWAY, Metrics
from sdxl_worker.serving.places import Full, Places
from sdxl_worker.settings import Settings, is_on_runpod

log = logging.getLogger(__name__)

# What Runpod's load balancer waits for an answer: a job that is sure to wait for longer is refused.
# As long have those that are here when the worker is told to end.
ANSWERED_WITHIN_SECONDS = 330.0
# What an answer may take on its way when the worker ends: 30 MB at four megabits a second.
LAST_ANSWERS_SECONDS = 60
# What callers are told where nobody knows: while the models load, and where another worker is on
# its way.
RETRY_AFTER_SECONDS = 10
# Longer than those of load balancers, which must be the ones that close an idle connection.
KEEP_ALIVE_SECONDS = 75
# What a request's head, or the first one of a connection, may take.
HEAD_SECONDS = 30
# Far above those of browsers and proxies. What is read at once comes on top.
MAX_HEAD_BYTES = 64 * 1024
# Below the usual limit of 1024 files.
MAX_CONNECTIONS = 900

STATUS = {
    Outcome.DONE: 200,
    Outcome.REFUSED: 400,
    Outcome.STOPPED: 503,
    Outcome.NO_MODEL: 503,
    Outcome.NO_PICTURE: 500,
    Outcome.OUT_OF_MEMORY: 503,
    Outcome.GPU_BROKEN: 503,
    Outcome.FAILED: 500,
}
# The same call would fail again, or most likely so. OpenAI's clients, which send a call that was
# answered with 5xx twice more by themselves, heed this; every try costs a GPU's time.
NOT_AGAIN = {"x-should-retry": "false"}
IN_VAIN = (Outcome.NO_PICTURE, Outcome.OUT_OF_MEMORY, Outcome.FAILED)
PING = "/ping"


class State(Enum):
    """What `/ping` answers with."""

    LOADING = 204
    READY = 200
    ENDING = 503


def serve(
    answer: Answering, settings: Settings, models: "Future[Any]", sockets: list[socket.socket]
) -> None:
    """Serve until the process is told to end, and its jobs are answered.

    Where the GPU cannot be used any more, the process ends with 1.

    Args:
        models: done once they have drawn, or cannot.
        sockets: as `open_ports` opens them.

    Raises:
        ModelError: the models cannot be loaded.
    """
    if not settings.api_keys and not is_on_runpod():
        log.warning(
            "API_KEY is not set: whoever reaches port %d can use this worker", settings.http_port
        )
    # uvicorn's own lines, in our form.
    uvicorn_log = logging.getLogger("uvicorn")
    uvicorn_log.setLevel(logging.WARNING)
    uvicorn_log.handlers = logging.getLogger("sdxl_worker").handlers

    async def until_the_end() -> None:
        worker = WorkerServer(answer, settings, models, refusal)
        loading = asyncio.create_task(worker.wait_for_models())
        await worker.server.serve(sockets)
        loading.cancel()
        if worker.failure is not None:
            raise worker.failure
        if worker.is_broken or not models.done():
            # The GPU thread would hold the process: with minutes of work, or for ever.
            logging.shutdown()
            os._exit(int(worker.is_broken))

    asyncio.run(until_the_end())


class WorkerServer:
    """One server in the running event loop."""

    def __init__(
        self,
        answer: Answering,
        settings: Settings,
        models: "Future[Any]",
        refused: Callable[[dict[str, Any]], Answer | None] = lambda _: None,
    ) -> None:
        """
        Args:
            refused: the answer to a job that need not wait for its turn, for its input is wrong.
        """
        self._answer = answer
        self._refused = refused
        self._models = models
        self._state = State.LOADING
        self.is_broken = False
        self.failure: BaseException | None = None
        """Why the models are not there."""
        longest_wait_seconds = ANSWERED_WITHIN_SECONDS if is_on_runpod() else None
        self._places = Places(settings.jobs_at_once, settings.queue_limit, longest_wait_seconds)
        self._metrics = Metrics(self._places)
        self._jobs: set[asyncio.Task[Answer]] = set()
        self._ending: asyncio.Task[None] | None = None
        self.app = _Guard(self._routes(), settings)
        self.server = _Server(
            uvicorn.Config(
                self.app,
                log_config=None,
                access_log=False,
                lifespan="off",
                loop="asyncio",
                http=_Connection,
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
                limit_concurrency=MAX_CONNECTIONS,
            ),
            self.told_to_end,
        )

    async def wait_for_models(self) -> None:
        try:
            await asyncio.shield(asyncio.wrap_future(self._models))
        except Exception as error:
            self.failure = error
            self.server.should_exit = True
            return
        self._metrics.on_model()
        if self._state is State.LOADING:
            self._state = State.READY
            log.info("ready")

    def told_to_end(self) -> None:
        """No job is let in any more; the server ends once those are answered that are here."""
        log.info("ending; jobs that are left: %d", self._places.taken)
        self._state = State.ENDING
        hurry()
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        if not self.is_broken:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWERED_WITHIN_SECONDS):
                    await self._places.until_empty()
        for job in self._jobs:
            job.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HURRIED_SECONDS):
                await self._places.until_empty()
        self.server.should_exit = True

    # Routes.

    def _routes(self) -> FastAPI:
        app = FastAPI(openapi_url=None, redirect_slashes=False)
        app.add_api_route(PING, self._ping, methods=["GET", "HEAD"])
        app.add_api_route("/metrics", self._read_metrics, methods=["GET"])
        app.add_api_route("/generate", self._generate, methods=["POST"])
        app.add_api_route(MODELS, self._openai_models, methods=["GET"])
        app.add_api_route(GENERATIONS, self._openai_generations, methods=["POST"])
        app.add_api_route(EDITS, self._openai_edits, methods=["POST"])
        app.add_exception_handler(HTTPException, _no_such_route)
        app.add_exception_handler(Exception, _failed)
        return app

    async def _ping(self) -> Response:
        return Response(status_code=self._state.value)

    async def _read_metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def _generate(self, request: Request) -> Response:
        async def job(body: bytes) -> dict[str, Any]:
            return job_of(body)

        return await self._drawn(request, job)

    async def _openai_models(self, request: Request) -> Response:
        """It draws nothing, and waits for nobody."""
        if (refusal := self._refusal()) is not None:
            return _refused(request, refusal)
        job = {"id": str(uuid.uuid4()), "input": {"openai_route": MODELS}}
        return _response(request, await self._answer(job))

    async def _openai_generations(self, request: Request) -> Response:
        async def job(body: bytes) -> dict[str, Any]:
            return _openai_job(GENERATIONS, read_object(body))

        return await self._drawn(request, job)

    async def _openai_edits(self, request: Request) -> Response:
        async def job(body: bytes) -> dict[str, Any]:
            return _openai_job(EDITS, await read_form_or_object(request, body))

        return await self._drawn(request, job)

    # Jobs.

    def _refusal(self) -> Refusal | None:
        """Why no job is let in; None where one is."""
        if self._state is State.LOADING:
            return Refusal(503, "the models are being loaded; try again", RETRY_AFTER_SECONDS)
        if self._state is State.ENDING:
            return Refusal(503, self._why_not_answered(), RETRY_AFTER_SECONDS)
        return None

    def _why_not_answered(self) -> str:
        if self.is_broken:
            return GPU_FAILED
        return "the worker was told to end; send the job again"

    async def _drawn(
        self, request: Request, job: Callable[[bytes], Awaitable[dict[str, Any]]]
    ) -> Response:
        """The answer to a request that is a job.

        Args:
            job: makes it of the request's body.
        """
        if (refusal := self._refusal()) is not None:
            return _refused(request, refusal)
        job_id = str(uuid.uuid4())
        try:
            # The place is taken before the body is read: what is held has a limit.
            with self._places.entered():
                read = {"id": job_id, **await job(await read_body(request))}
                if self.is_broken and (refusal := self._refusal()) is not None:
                    return _refused(request, refusal)
                if (wrong := self._refused(read)) is not None:
                    return self._responded(request, read, wrong)
                return await self._run(request, read)
        except Full as full:
            self._metrics.on_job(TURNED_AWAY)
            told = f"too many jobs wait; try again in {full.retry_after_seconds} seconds"
            return _refused(request, Refusal(429, told, full.retry_after_seconds))
        except Refusal as refused:
            return _refused(request, refused)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads

    async def _run(self, request: Request, job: dict[str, Any]) -> Response:
        job_id, began = job["id"], time.monotonic()

        async def work() -> Answer:
            self._metrics.on_stage("wait", time.monotonic() - began)
            return await self._answer(job)

        running = asyncio.create_task(self._places.run(work))
        self._jobs.add(running)
        running.add_done_callback(self._jobs.discard)
        hang_up = asyncio.create_task(_hang_up(request))
        try:
            await asyncio.wait({running, hang_up}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                log.info("the client hung up", extra={"job_id": job_id})
        finally:
            hang_up.cancel()
            if not running.done():
                running.cancel()
                await asyncio.wait({running})
            asyncio.get_running_loop().run_in_executor(None, give_back_host_memory)
        seconds = time.monotonic() - began
        self._metrics.on_stage("job", seconds)
        if running.cancelled():
            self._metrics.on_job(Outcome.STOPPED.value)
            return _refused(request, Refusal(503, self._why_not_answered(), RETRY_AFTER_SECONDS))
        answer = running.result()
        log.info(
            "answered with %d after %.1f s",
            STATUS[answer.outcome],
            seconds,
            extra={"job_id": job_id, "seconds": round(seconds, 2)},
        )
        if answer.outcome is Outcome.GPU_BROKEN and not self.is_broken:
            self.is_broken = True
            self.told_to_end()
        return self._responded(request, job, answer)

    def _responded(self, request: Request, job: dict[str, Any], answer: Answer) -> Response:
        self._metrics.on_job(answer.outcome.value, answer.output)
        response = _response(request, answer)
        response.headers["X-Job-Id"] = job["id"]
        return response


class _Server(uvicorn.Server):
    """uvicorn's, which ends otherwise: a signal ends nothing that is under way."""

    def __init__(self, config: uvicorn.Config, told_to_end: Callable[[], None]) -> None:
        super().__init__(config)
        self._told_to_end = told_to_end

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)

        def on_first() -> None:
            for second in signals:
                loop.add_signal_handler(second, os._exit, 128 + second)
            self._told_to_end()

        for first in signals:
            loop.add_signal_handler(first, on_first)
        yield


class _Connection(HttpToolsProtocol):
    """uvicorn's, which would wait for ever for a request's head, or for the rest of a body that was
    answered already, and keep heads of any size."""

    _giving_up: asyncio.TimerHandle | None = None
    _beside_bodies_bytes = 0
    """What came since the last of a body, or of a request: a head, or what may follow chunks."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._give_up_in(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        if self._beside_bodies_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's head is too large.")
            return
        self._beside_bodies_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._give_up_in(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._expect_nothing()
        self._beside_bodies_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_bodies_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._beside_bodies_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            # uvicorn's own limit of an idle connection ends with the first byte that follows.
            self._give_up_in(KEEP_ALIVE_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _give_up_in(self, seconds: float) -> None:
        if self._giving_up is None:
            self._giving_up = self.loop.call_later(seconds, self.transport.close)

    def _expect_nothing(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None


class _Guard:
    """Before the routes: the key, and what the health port does not have."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._is_apart = settings.port_health not in (None, settings.http_port)
        self._port_health = settings.port_health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (refusal := self._refusal(scope)) is None:
            await self._app(scope, receive, send)
        else:
            await _refused(Request(scope), refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        if scope["path"] == PING:
            return None
        if self._is_apart and scope["server"][1] == self._port_health:
            return Refusal(404, f"there is only {PING} at this port")
        headers = Request(scope).headers
        if not self._keys:
            # The pages of other sites reach what this machine's browser reaches, and need no answer
            # to use the GPU. Runpod has asked for a key before.
            if headers.get("sec-fetch-site") == "cross-site" and not is_on_runpod():
                return Refusal(
                    403, "a page of another site cannot use a worker without a key; set API_KEY"
                )
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode("latin-1")
        # All of them, whichever fits: the time tells nothing.
        fits = [hmac.compare_digest(sent, key) for key in self._keys]
        if any(fits) and scheme.lower() == "bearer":
            return None
        return Refusal(401, "the API key is missing or wrong; send Authorization: Bearer KEY")


def _openai_job(route: str, openai_input: dict[str, Any]) -> dict[str, Any]:
    """As the platform hands it over."""
    return {"input": {"openai_route": route, "openai_input": openai_input}}


async def _hang_up(request: Request) -> None:
    """Until the client is gone. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(request: Request, answer: Answer) -> Response:
    status = STATUS[answer.outcome]
    if "error" not in answer.output:
        return _json(status, answer.output)
    retry_after_seconds = RETRY_AFTER_SECONDS if answer.outcome is Outcome.STOPPED else None
    response = _refused(request, Refusal(status, answer.output["error"], retry_after_seconds))
    if answer.outcome in IN_VAIN:
        response.headers.update(NOT_AGAIN)
    return response


def _refused(request: Request, refusal: Refusal) -> Response:
    """An error as the route's clients expect it."""
    error: object = str(refusal)
    if request.url.path.startswith("/v1/"):
        kind = INVALID_REQUEST if refusal.status < 500 else "server_error"
        error = {"message": str(refusal), "type": kind, "param": None, "code": None}
    response = _json(refusal.status, {"error": error})
    if refusal.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(refusal.retry_after_seconds)
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _json(status: int, content: dict[str, Any]) -> Response:
    # ASCII: an answer with half a character (a lone surrogate) can be encoded, too.
    return Response(json.dumps(content), status_code=status, media_type="application/json")


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    told = {404: "there is no such route", 405: f"this route does not take {request.method}"}
    response = _refused(
        request, Refusal(error.status_code, told.get(error.status_code, error.detail))
    )
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    told = f"the worker failed at this request ({type(error).__name__}); its log says where"
    return _refused(request, Refusal(500, told))
