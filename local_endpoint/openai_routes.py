"""OpenAI's API, under `/v2/<endpoint>/openai/v1/` as on the platform, and under `/openai/v1/`.

A call becomes a job, `{"openai_route": "/v1/...", "openai_input": {...}}`, and the job's output the
answer. How the platform answers for a job that fails is not documented.
"""

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import BodyPartReader, web

from local_endpoint.polling import Changes
from local_endpoint.queue import Job, JobQueue, RequestRefused, Status
from local_endpoint.reading import check_size, read_json

MODELS = "/v1/models"
POSTED = ("/v1/images/generations", "/v1/images/edits")
CHUNK_BYTES = 64 * 1024
MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+", re.ASCII)
# Else OpenAI's clients send a call again that was answered with 5xx. The queue does that itself,
# where it helps, and every further try costs a GPU's time.
NOT_AGAIN = {"x-should-retry": "false"}
# Of a worker's error: in its output, whose mistake it is.
CALLERS_MISTAKE = {"error_type": "invalid_request_error"}


class OpenAIRoutes:
    """Handlers that queue a job, wait for its end, and cancel it when the client is gone."""

    def __init__(self, queue: JobQueue, changes: Changes) -> None:
        self._queue = queue
        self._changes = changes

    def add_to(self, app: web.Application, *prefixes: str) -> None:
        for prefix in prefixes:
            app.router.add_get(f"{prefix}/openai{MODELS}", self.models)
            for route in POSTED:
                app.router.add_post(f"{prefix}/openai{route}", self.images)

    async def models(self, _: web.Request) -> web.Response:
        return await self._answer({"openai_route": MODELS})

    async def images(self, request: web.Request) -> web.Response:
        max_bytes = self._queue.rules.runsync_max_bytes
        check_size(request.content_length or 0, max_bytes)
        if request.content_type == "multipart/form-data":
            fields = await _form(request, max_bytes)
        else:
            body = await request.read()
            check_size(len(body), max_bytes)
            fields = read_json(body)
        route = request.path.rpartition("/openai")[2]
        return await self._answer({"openai_route": route, "openai_input": fields})

    async def _answer(self, job_input: dict[str, Any]) -> web.Response:
        job = self._queue.submit({"input": job_input}, is_sync=True)
        try:
            # It ends by its timeouts, at the latest.
            longest_seconds = self._queue.rules.policy_max_seconds
            await self._changes.wait_for(lambda: job.is_finished or job.is_gone, longest_seconds)
        except asyncio.CancelledError:
            self._queue.cancel(job)
            raise
        if job.status is Status.COMPLETED and job.has_output:
            return web.json_response(job.output)
        is_mistake = job.status is Status.FAILED and job.output == CALLERS_MISTAKE
        return web.json_response(
            {"error": job.error or self._what_became_of(job)},
            status=400 if is_mistake else 500,
            headers=NOT_AGAIN,
        )

    def _what_became_of(self, job: Job) -> str:
        match job.status:
            case Status.COMPLETED:
                limit = self._queue.rules.runsync_max_bytes
                return f"the answer did not come: it was empty, or over {limit} bytes"
            case Status.CANCELLED | Status.TIMED_OUT:
                return f"the job was {job.status.value.lower().replace('_', ' ')}"
        return "the job waited too long in the queue, or was removed from it"


async def _form(request: web.Request, max_bytes: int) -> dict[str, Any]:
    """The parts of a form by name: text as it is, files as data URIs, several of one name as a list
    (`name[]` is one in any case).

    Raises:
        RequestRefused: it cannot be read.
        HTTPRequestEntityTooLarge: its parts are over the limit.
    """
    fields: dict[str, Any] = {}
    size = 0
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader) or not part.name:
                raise RequestRefused("each part of the form must have a name, and no parts inside")
            content = bytearray()
            while chunk := await part.read_chunk(CHUNK_BYTES):
                size += len(chunk)
                check_size(size, max_bytes)
                content += chunk
            name, value = part.name.removesuffix("[]"), _value(part, bytes(content))
            if name in fields or part.name.endswith("[]"):
                before = fields.get(name, [])
                fields[name] = [*(before if isinstance(before, list) else [before]), value]
            else:
                fields[name] = value
    except RequestRefused:
        raise
    except (ValueError, AssertionError) as error:
        raise RequestRefused(f"the form cannot be read: {str(error)[:200]}") from None
    return fields


def _value(part: BodyPartReader, content: bytes) -> str:
    if part.filename is None:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise RequestRefused("each text of the form must be UTF-8") from None
    sent = part.headers.get("Content-Type", "")
    media_type = sent if MEDIA_TYPE.fullmatch(sent) else "application/octet-stream"
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


@web.middleware
async def openai_errors(
    request: web.Request,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    """`{"error": "..."}` in the form that OpenAI's clients read, on their routes."""
    response = await handler(request)
    if response.status < 400 or "/openai/v1" not in request.path:
        return response
    try:
        told = json.loads(response.text or "") if isinstance(response, web.Response) else None
    except ValueError:
        told = None  # a fault that a test asked for
    if not isinstance(told, dict):
        return response
    error = {
        "message": told.get("error"),
        "type": "invalid_request_error" if response.status < 500 else "server_error",
        "param": None,
        "code": None,
    }
    headers = {name: response.headers[name] for name in NOT_AGAIN if name in response.headers}
    return web.json_response({"error": error}, status=response.status, headers=headers)
