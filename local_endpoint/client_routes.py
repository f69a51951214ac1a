"""What clients call, under `/v2/<endpoint>/`: the operations of Runpod's endpoint API."""

from collections.abc import Callable

from aiohttp import web

from local_endpoint.polling import Changes
from local_endpoint.queue import Job, JobQueue
from local_endpoint.reading import check_size, path_names, read_integer, read_json


class ClientRoutes:
    """Handlers that read and change the queue."""

    def __init__(
        self, queue: JobQueue, changes: Changes, count_starting: Callable[[], int]
    ) -> None:
        self._queue = queue
        self._changes = changes
        self._count_starting = count_starting

    def add_to(self, app: web.Application, prefix: str) -> None:
        routes = app.router
        routes.add_post(f"{prefix}/run", self.run)
        routes.add_post(f"{prefix}/runsync", self.runsync)
        routes.add_get(f"{prefix}/status/{{job_id}}", self.status)
        routes.add_post(f"{prefix}/status/{{job_id}}", self.status)
        routes.add_get(f"{prefix}/stream/{{job_id}}", self.stream)
        routes.add_post(f"{prefix}/stream/{{job_id}}", self.stream)
        routes.add_post(f"{prefix}/cancel/{{job_id}}", self.cancel)
        routes.add_post(f"{prefix}/retry/{{job_id}}", self.retry)
        routes.add_post(f"{prefix}/purge-queue", self.purge_queue)
        routes.add_get(f"{prefix}/health", self.health)

    async def run(self, request: web.Request) -> web.Response:
        job = await self._submit(request, is_sync=False)
        return web.json_response({"id": job.id, "status": job.status.value})

    async def runsync(self, request: web.Request) -> web.Response:
        """Answer when the job has ended, or with its state after `?wait=` milliseconds."""
        wait_seconds = self._wait_seconds(request)
        job = await self._submit(request, is_sync=True)
        await self._changes.wait_for(lambda: job.is_finished or job.is_gone, wait_seconds)
        if job.is_gone:
            raise _not_found(job.id)
        return web.json_response(job.for_client())

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self._find(request).for_client())

    async def stream(self, request: web.Request) -> web.Response:
        job = self._find(request)
        chunks = [{"output": chunk} for chunk in self._queue.next_chunks(job)]
        return web.json_response({"status": job.status.value, "stream": chunks})

    async def cancel(self, request: web.Request) -> web.Response:
        job = self._find(request)
        self._queue.cancel(job)
        return web.json_response({"id": job.id, "status": job.status.value})

    async def retry(self, request: web.Request) -> web.Response:
        job = self._find(request)
        self._queue.retry(job)
        return web.json_response({"id": job.id, "status": job.status.value})

    async def purge_queue(self, _: web.Request) -> web.Response:
        return web.json_response({"removed": self._queue.purge(), "status": "completed"})

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response(self._queue.health(self._count_starting()))

    async def _submit(self, request: web.Request, *, is_sync: bool) -> Job:
        rules = self._queue.rules
        max_bytes = rules.runsync_max_bytes if is_sync else rules.run_max_bytes
        body = await request.read()
        check_size(len(body), max_bytes)
        return self._queue.submit(read_json(body), is_sync=is_sync)

    def _find(self, request: web.Request) -> Job:
        [job_id] = path_names(request)
        job = self._queue.find(job_id)
        if job is None:
            raise _not_found(job_id)
        return job

    def _wait_seconds(self, request: web.Request) -> float:
        rules = self._queue.rules
        text = request.query.get("wait")
        if text is None:
            return rules.runsync_wait_seconds
        minimum, maximum = rules.runsync_wait_min_seconds, rules.runsync_wait_max_seconds
        return (
            read_integer("wait", text, int(minimum * 1000), int(maximum * 1000), " milliseconds")
            / 1000
        )


def _not_found(job_id: str) -> web.HTTPException:
    return web.HTTPNotFound(text=f"there is no job {job_id[:80]}")
