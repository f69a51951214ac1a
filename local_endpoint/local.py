"""The endpoint for tests: a context manager, with the server in a thread of its own."""

import asyncio
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from local_endpoint.faults import Faults
from local_endpoint.queue import Job, JobQueue
from local_endpoint.record import Record
from local_endpoint.server import Options, Server
from local_endpoint.workers import EndpointError, Worker

T = TypeVar("T")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


class LocalEndpoint:
    """An endpoint with workers, for a `with` block.

    The block is entered when all workers are ready; everything is stopped at its end. `faults` and
    `record` may be used from the test's thread.

        with LocalEndpoint(worker_command=[sys.executable, "handler.py"], workers=2) as endpoint:
            job_id = endpoint.run({"prompt": "a red circle"})
            answer = endpoint.wait(job_id)
    """

    def __init__(self, *, start_timeout_seconds: float = 120, **options: Any) -> None:
        """
        Args:
            start_timeout_seconds: how long the workers may take to be ready.
            options: the fields of `Options`.
        """
        self.options = Options(**options)
        self._start_timeout_seconds = start_timeout_seconds
        self._server: Server
        self._loop: asyncio.AbstractEventLoop
        self._serving: asyncio.Task[None] | None = None
        self._stop_asked: asyncio.Event
        self._started: Future[None] = Future()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="local-endpoint", daemon=True)

    def __enter__(self) -> Self:
        """
        Raises:
            EndpointError: the port is taken, or a worker ended before it was ready, or is not
                ready in time.
        """
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            if not self._started.done():  # the test was interrupted
                self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop_asked.set)
            self._thread.join()
        if self._failure is not None:
            if error is None:
                raise self._failure
            error.add_note(f"The endpoint had stopped: {self._failure}")

    @property
    def endpoint_id(self) -> str:
        return self.options.endpoint_id

    @property
    def api_key(self) -> str:
        return self.options.api_key

    @property
    def url_base(self) -> str:
        """For `runpod.endpoint_url_base`."""
        return self._server.url_base

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def log_dir(self) -> Path:
        return self._server.log_dir

    @property
    def faults(self) -> Faults:
        return self._server.faults

    @property
    def record(self) -> Record:
        return self._server.record

    @property
    def workers(self) -> list[Worker]:
        """Those that run, the oldest first, including those that are still starting."""
        return self._server.pool.workers

    @property
    def jobs(self) -> list[Job]:
        """All jobs that are not deleted yet. Do not change them."""
        return self.with_queue(lambda queue: queue.jobs)

    @property
    def worker_environment(self) -> dict[str, str]:
        """For a worker that the test starts itself; RUNPOD_POD_ID, its name, is to be added."""
        return self._server.worker_environment()

    def with_queue(self, look: Callable[[JobQueue], T]) -> T:
        """Call `look` with the queue, in the server's thread."""

        async def call() -> T:
            return look(self._server.queue)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(30)

    def wait_until_ready(self) -> None:
        """Wait until all workers, replacements too, have asked for jobs or pinged."""
        waiting = self._server.wait_until_ready()
        asyncio.run_coroutine_threadsafe(waiting, self._loop).result(self._start_timeout_seconds)

    def call(
        self,
        route: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        timeout_seconds: float = 60,
    ) -> tuple[int, Any]:
        """One request to `<url>/<route>`: POST where there is a body, else GET.

        Returns:
            The status code, and the answer's JSON (None for an empty one).
        """
        sent = {"Authorization": f"Bearer {self.api_key}"} if headers is None else headers
        request = urllib.request.Request(  # noqa: S310  the address is our own
            f"{self.url}/{route}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", **sent},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as response:  # noqa: S310
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def run(self, job_input: Any, *, job_id: str | None = None, **more: Any) -> str:
        """Queue a job with /run (`policy`, `webhook`... beside its input) and return its id.

        With `job_id`, an odd one perhaps, the job is queued without HTTP: clients choose no ids.
        """
        if job_id is not None:
            request = {"input": job_input, **more}
            self.with_queue(lambda queue: queue.submit(request, is_sync=False, job_id=job_id))
            return job_id
        code, answer = self.call("run", {"input": job_input, **more})
        if code != 200:
            raise EndpointError(f"/run answered {code}: {answer}")
        return str(answer["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        """What /status answers."""
        code, answer = self.call(f"status/{urllib.parse.quote(job_id, safe='')}")
        if code != 200:
            raise EndpointError(f"/status answered {code}: {answer}")
        return dict(answer)

    def wait(self, job_id: str, *statuses: str, timeout_seconds: float = 60) -> dict[str, Any]:
        """Ask for the status until it is one of `statuses` (none given: until the job has ended).

        Raises:
            TimeoutError: it was none of them in time; the message has the last answer.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            answer = self.status(job_id)
            if answer["status"] in (statuses or ENDED):
                return answer
            if time.monotonic() > deadline:
                raise TimeoutError(f"still {answer}")
            time.sleep(0.05)

    def _cancel(self) -> None:
        if self._serving is not None:
            self._serving.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                self._failure = error
            else:
                self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._serving = asyncio.current_task()
        self._stop_asked = asyncio.Event()
        self._server = Server(self.options)
        try:
            await self._server.start()
            try:
                async with asyncio.timeout(self._start_timeout_seconds):
                    await self._server.wait_until_ready()
            except TimeoutError:
                seconds = self._start_timeout_seconds
                raise EndpointError(f"not all workers were ready after {seconds} s") from None
            self._started.set_result(None)
            await self._server.run(self._stop_asked.wait)
        finally:
            await self._server.stop()
