"""What workers call, under `/v2/<endpoint>/`, as Runpod's Python SDK does."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from aiohttp import web

from local_endpoint.faults import Faults
from local_endpoint.polling import Changes
from local_endpoint.queue import JobQueue, Receipt, RequestRefused
from local_endpoint.reading import path_names, read_integer, read_json
from local_endpoint.record import Ping, Post, PostKind, Record, Stop, Take
from local_endpoint.workers import WorkerPool

T = TypeVar("T")

# Not documented. More than any worker asks for.
MAX_BATCH_SIZE = 1000
# A worker that has to end is held this long, to notice it before it asks again.
DRAINING_POLL_SECONDS = 0.3


class WorkerRoutes:
    """Handlers of what workers ask and post."""

    def __init__(
        self,
        queue: JobQueue,
        changes: Changes,
        faults: Faults,
        record: Record,
        pool: WorkerPool,
    ) -> None:
        self._queue = queue
        self._changes = changes
        self._faults = faults
        self._record = record
        self._pool = pool

    def add_to(self, app: web.Application, prefix: str) -> None:
        routes = app.router
        routes.add_get(f"{prefix}/job-take/{{worker}}", self.job_take)
        routes.add_get(f"{prefix}/job-take-batch/{{worker}}", self.job_take_batch)
        routes.add_get(f"{prefix}/job-stop/{{worker}}", self.job_stop)
        routes.add_post(f"{prefix}/job-done/{{worker}}/{{job}}", self.job_done)
        routes.add_post(f"{prefix}/job-stream/{{worker}}/{{job}}", self.job_stream)
        routes.add_get(f"{prefix}/ping/{{worker}}", self.ping)

    async def job_take(self, request: web.Request) -> web.Response:
        jobs = await self._take(request, 1)
        return web.json_response(jobs[0]) if jobs else web.Response(status=204)

    async def job_take_batch(self, request: web.Request) -> web.Response:
        text = _parameters(request).get("batch_size", "1")
        jobs = await self._take(request, read_integer("batch_size", text, 1, MAX_BATCH_SIZE))
        return web.json_response(jobs) if jobs else web.Response(status=204)

    async def job_stop(self, request: web.Request) -> web.Response:
        [worker_id] = path_names(request)
        job_ids = await self._hold(worker_id, lambda: self._queue.take_stops(worker_id))
        if not job_ids:
            return web.Response(status=204)
        self._record.stops.append(Stop(time.monotonic(), worker_id, tuple(job_ids)))
        return web.json_response({"jobsToStop": job_ids})

    async def job_done(self, request: web.Request) -> web.Response:
        """Take a result, or progress where the body has `"status": "IN_PROGRESS"`."""
        worker_id, job_id = path_names(request)
        size_bytes, body = await _json_object(request)
        if is_progress(body):
            progress = body.get("output")
            receipt = self._queue.note_progress(worker_id, job_id, progress)
            return self._answer("progress", request, body, size_bytes, receipt)
        receipt = self._queue.finish(worker_id, job_id, body, size_bytes)
        if body.get("stopPod") is True:
            self._queue.drain(worker_id)
            self._pool.recycle(worker_id)
        return self._answer("result", request, body, size_bytes, receipt)

    async def job_stream(self, request: web.Request) -> web.Response:
        worker_id, job_id = path_names(request)
        size_bytes, body = await _json_object(request)
        receipt = self._queue.add_chunk(worker_id, job_id, body.get("output"), size_bytes)
        return self._answer("chunk", request, body, size_bytes, receipt)

    async def ping(self, request: web.Request) -> web.Response:
        [worker_id] = path_names(request)
        parameters = _parameters(request)
        job_ids = tuple(filter(None, parameters.get("job_id", "").split(",")))
        unhealthy_because = None
        if parameters.get("status") == "unhealthy":
            unhealthy_because = parameters.get("reason", "no reason given")
        self._queue.ping(worker_id, job_ids, unhealthy_because)
        self._record.pings.append(Ping(time.monotonic(), worker_id, job_ids, unhealthy_because))
        return web.Response()

    async def _take(self, request: web.Request, count: int) -> list[dict[str, Any]]:
        [worker_id] = path_names(request)
        jobs = await self._hold(worker_id, lambda: self._queue.take(worker_id, count))
        if jobs:
            for job in jobs:
                if self._faults.next_duplicate():
                    self._queue.deliver_again(job)
            has_jobs = _parameters(request).get("job_in_progress") == "1"
            job_ids = tuple(job.id for job in jobs)
            self._record.takes.append(Take(time.monotonic(), worker_id, job_ids, count, has_jobs))
        return [job.for_worker() for job in jobs]

    async def _hold(self, worker_id: str, look: Callable[[], list[T]]) -> list[T]:
        """Hold the request until there is an answer; the SDK asks again without a pause."""
        self._queue.hear(worker_id)
        found = await self._changes.wait_for(
            lambda: look() or self._queue.is_draining(worker_id), self._queue.rules.poll_seconds
        )
        if found is True:
            await asyncio.sleep(DRAINING_POLL_SECONDS)
            return look()
        return found or []

    def _answer(
        self,
        kind: PostKind,
        request: web.Request,
        body: dict[str, Any],
        size_bytes: int,
        receipt: Receipt,
    ) -> web.Response:
        worker_id, job_id = path_names(request)
        self._record.posts.append(
            Post(time.monotonic(), kind, worker_id, job_id, body, size_bytes, receipt)
        )
        if receipt is Receipt.TOO_LARGE:
            raise RequestRefused(f"{size_bytes} bytes are too many")
        if receipt is Receipt.UNKNOWN:
            raise web.HTTPNotFound(text=f"there is no job {job_id[:80]}")
        if receipt is Receipt.LATE and kind == "result":
            return web.Response(status=self._queue.rules.late_result_status_code)
        return web.Response()


def is_progress(body: dict[str, Any]) -> bool:
    """Whether what was posted to job-done is progress, not a result."""
    return body.get("status") == "IN_PROGRESS"


def _parameters(request: web.Request) -> dict[str, str]:
    tail = request.rel_url.raw_path.partition("&")[2]  # the SDK's, of an address without "?"
    return dict(parse_qsl(tail)) | dict(request.query)


async def _json_object(request: web.Request) -> tuple[int, dict[str, Any]]:
    """The size and the JSON of a body. The SDK gives it the content type of a form."""
    content = await request.read()
    body = read_json(content)
    if not isinstance(body, dict):
        raise RequestRefused("the body must be a JSON object")
    return len(content), body
