"""One endpoint: the queue, its HTTP server on loopback, and its workers, wired together."""

import asyncio
import contextlib
import errno
import hmac
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from local_endpoint.client_routes import ClientRoutes
from local_endpoint.faults import Faults
from local_endpoint.openai_routes import OpenAIRoutes, openai_errors
from local_endpoint.page import PageRoutes, allowing
from local_endpoint.polling import Changes
from local_endpoint.queue import Job, JobQueue, RequestRefused, Rules
from local_endpoint.reading import read_json, route_of
from local_endpoint.record import Exchange, Record
from local_endpoint.webhooks import call_webhook
from local_endpoint.worker_routes import WorkerRoutes, is_progress
from local_endpoint.workers import EndpointError, WorkerPool

HOST = "127.0.0.1"
REPOSITORY = Path(__file__).resolve().parent.parent
TICK_SECONDS = 0.05
# Large enough for every body whose size the rules have to judge.
READ_MAX_BYTES = 2**30
ROUTE = web.RequestKey("route", str)
FAULT = web.RequestKey("fault", str)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an endpoint is made of.

    The default id and key are the placeholders of Runpod's documents, whose commands then work
    with only the host replaced.
    """

    worker_command: Sequence[str] = (sys.executable, "handler.py")
    workers: int = 1
    port: int = 0  # 0: a free one
    endpoint_id: str = "ENDPOINT_ID"
    api_key: str = "YOUR_API_KEY"
    rules: Rules = field(default_factory=Rules)
    environment: Mapping[str, str] = field(default_factory=dict)  # more variables for the workers
    worker_query: str = "gpu=local"  # what the workers' addresses end in; "" leaves out the "?"
    working_dir: Path = REPOSITORY
    log_dir: Path | None = None  # of the workers' output; None: a temporary one
    stop_grace_seconds: float = 5  # for workers that are asked to end
    record_limit: int | None = None
    allow_origin: str | None = None  # of pages from elsewhere that may call; "null": from a file


class Server:
    """An endpoint in the running event loop. Whoever made one must `stop` it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.faults = Faults()
        self.record = Record(options.record_limit)
        self._changes = Changes()
        self.queue = JobQueue(
            options.rules, changed=self._changes.notify, ended=self._start_webhook
        )
        self._cleanup = contextlib.ExitStack()
        self._temporary_dir = Path(
            self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="local-endpoint-"))
        )
        self.log_dir = options.log_dir or self._temporary_dir / "logs"
        self.pool = WorkerPool(
            options.worker_command,
            options.working_dir,
            self.log_dir,
            is_ready=self.queue.has_heard,
            gone=self.queue.forget,
        )
        self.port = options.port
        self._runner = web.AppRunner(
            self._app(),
            access_log=None,
            # A request whose sender is gone must not take a job.
            handler_cancellation=True,
            shutdown_timeout=1,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._webhooks: set[asyncio.Task[None]] = set()

    @property
    def url_base(self) -> str:
        """What replaces `https://api.runpod.ai/v2`."""
        return f"http://{HOST}:{self.port}/v2"

    @property
    def url(self) -> str:
        return f"{self.url_base}/{self.options.endpoint_id}"

    @property
    def page_url(self) -> str:
        return f"http://{HOST}:{self.port}/"

    async def start(self) -> None:
        """Listen, and start the workers.

        Raises:
            EndpointError: the port is taken, or the workers' command cannot be run.
        """
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, self.options.port)
        try:
            await site.start()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is taken; choose another one" if taken else f"cannot be used: {error}"
            raise EndpointError(f"port {self.options.port} {reason}") from None
        [listening] = [address for address in self._runner.addresses if address]
        self.port = listening[1]
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.pool.start(
            self.options.workers, self.worker_environment(), self.options.stop_grace_seconds
        )
        self._tasks = {
            asyncio.create_task(self._tick_for_ever()),
            asyncio.create_task(self.pool.watch()),
        }

    async def run(self, until: Callable[[], Awaitable[object]]) -> None:
        """Keep the endpoint going until `until` returns.

        Raises:
            EndpointError: a worker ended before it was ready.
        """
        waiting = asyncio.ensure_future(until())
        try:
            done, _ = await asyncio.wait(
                {waiting, *self._tasks}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                await task
        finally:
            waiting.cancel()

    async def wait_until_ready(self) -> None:
        """Wait until all workers have asked for jobs or pinged."""
        await self.run(self._all_are_ready)

    async def stop(self) -> None:
        """End the workers and the server. Nothing is left behind."""
        try:
            for worker in self.pool.workers:
                self.queue.drain(worker.id)
            for task in self._tasks:
                task.cancel()
            await self.pool.stop()
        finally:
            self.pool.kill()
            for task in self._webhooks:
                task.cancel()
            await self._runner.cleanup()
            self._cleanup.close()

    async def _all_are_ready(self) -> None:
        while self.pool.starting_count:
            await asyncio.sleep(TICK_SECONDS)

    async def _tick_for_ever(self) -> None:
        while True:
            self.queue.tick()
            await asyncio.sleep(TICK_SECONDS)

    def _start_webhook(self, job: Job) -> None:
        url = job.request.get("webhook")
        if isinstance(url, str) and url:
            call = call_webhook(url, job.for_webhook(), self.options.rules, self.record)
            task = asyncio.get_running_loop().create_task(call)
            self._webhooks.add(task)
            task.add_done_callback(self._webhooks.discard)

    def worker_environment(self) -> dict[str, str]:
        """What workers find in their environment, but for RUNPOD_POD_ID: each has its own."""
        query = f"?{self.options.worker_query}" if self.options.worker_query else ""
        # Credentials in the home folder would override RUNPOD_AI_API_KEY.
        home = self._temporary_dir / "home"
        home.mkdir(exist_ok=True)
        inherited = {
            name: value
            for name, value in os.environ.items()
            # Would start a server in place of a worker.
            if not name.startswith(("RUNPOD_REALTIME_", "SERVE_HTTP"))
        }
        return {
            **inherited,
            "HOME": str(home),
            "PYTHONUNBUFFERED": "1",
            "RUNPOD_AI_API_KEY": self.options.api_key,
            "RUNPOD_ENDPOINT_ID": self.options.endpoint_id,
            "RUNPOD_PING_INTERVAL": str(self.options.rules.ping_interval_seconds * 1000),
            # The checks need a GPU and the Internet.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/job-take/$ID{query}",
            "RUNPOD_WEBHOOK_PING": f"{self.url}/ping/$RUNPOD_POD_ID{query}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/job-done/$RUNPOD_POD_ID/$ID{query}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/job-stream/$RUNPOD_POD_ID/$ID{query}",
            **self.options.environment,
        }

    def _app(self) -> web.Application:
        prefix = f"/v2/{self.options.endpoint_id}"
        origin = self.options.allow_origin
        allowed = [] if origin is None else [allowing(origin, f"{prefix}/")]
        app = web.Application(
            client_max_size=READ_MAX_BYTES,
            middlewares=[*allowed, openai_errors, self._recorded, self._guarded],
        )
        self._page = PageRoutes(lambda: self.url, self.options.api_key)
        self._page.add_to(app)
        ClientRoutes(self.queue, self._changes, lambda: self.pool.starting_count).add_to(
            app, prefix
        )
        WorkerRoutes(self.queue, self._changes, self.faults, self.record, self.pool).add_to(
            app, prefix
        )
        OpenAIRoutes(self.queue, self._changes).add_to(app, prefix, "")
        return app

    @web.middleware
    async def _recorded(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Note each request with its answer, and turn refusals into `{"error": "..."}`."""
        came_at = time.monotonic()
        status_code = None
        try:
            try:
                response = await handler(request)
            except RequestRefused as refusal:
                response = _error(400, str(refusal))
            except web.RequestPayloadError:
                response = _error(400, "the body's encoding, or its chunks, cannot be read")
            except web.HTTPException as refusal:
                response = _error(refusal.status, refusal.text or refusal.reason)
            if request.transport is not None and not request.transport.is_closing():
                status_code = response.status
            return response
        finally:
            self.record.exchanges.append(
                Exchange(
                    came_at,
                    time.monotonic(),
                    request.method,
                    request.get(ROUTE, ""),
                    request.path,
                    status_code,
                    request.get(FAULT),
                )
            )

    @web.middleware
    async def _guarded(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Check the key, and make the faults happen that tests asked for."""
        if self._page.serves(request):
            return await handler(request)
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # The server keeps bytes that are not UTF-8 as surrogates.
        sent = key.encode(errors="surrogateescape")
        if not hmac.compare_digest(sent, self.options.api_key.encode(errors="surrogateescape")):
            return _error(401, "the API key is missing or wrong")
        route = request[ROUTE] = await _route(request)
        fault = self.faults.next(route)
        if fault is None:
            return await handler(request)
        request[FAULT] = fault.kind
        match fault.kind:
            case "answer":
                headers = {"Content-Type": "application/json", **fault.headers}
                body = fault.body.encode()
                return web.Response(status=fault.status_code, headers=headers, body=body)
            case "drop":
                return _dropped(request)
        await asyncio.sleep(fault.delay_seconds)
        response = await handler(request)
        return _dropped(request) if fault.kind == "drop-answer" else response


async def _route(request: web.Request) -> str:
    route = route_of(request)
    if route == "job-done":
        with contextlib.suppress(RequestRefused):
            body = read_json(await request.read())
            if isinstance(body, dict) and is_progress(body):
                return "progress"
    return route


def _error(status_code: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status_code)


def _dropped(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
