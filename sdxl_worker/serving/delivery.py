"""Results on their way to the platform, each kept until the platform has it.

The SDK posts a result once, three times where the platform answers 5xx, and then drops it: after
one 429, 400, 408 or broken connection the picture is gone, and its job runs into its timeout.
"""

import asyncio
import itertools
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import aiohttp

log = logging.getLogger(__name__)

# How long a result is kept; of that, how long a refusal is not believed.
KEPT_SECONDS = 120.0
REFUSED_SECONDS = 60.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
POST_TIMEOUT_SECONDS = 60.0
# A gateway may answer 404 for a moment. A third one means it: the job was deleted.
UNKNOWN_JOB_TRIES = 3
ALREADY_HAS_A_RESULT = (409, 410)
TOO_LARGE = 413
PASSING = (408, 425, 429)  # of the 4xx; all 5xx pass


def job_url(job_id: str) -> str | None:
    """Where the platform takes results and progress of this job, or None where there is none.

    It comes from the variables that the SDK posts results with. An id is the platform's word: in
    the path it is quoted, or "../x" would lead elsewhere.
    """
    template = os.environ.get("RUNPOD_WEBHOOK_POST_OUTPUT")
    if not template or not os.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        return None
    from runpod.serverless.modules.worker_state import WORKER_ID

    url = template.replace("$RUNPOD_POD_ID", WORKER_ID).replace("$ID", quote(job_id, safe=""))
    return url + "&isStream=false"


class Deliveries:
    """Those that are under way."""

    def __init__(self, done: Callable[[str], None]) -> None:
        """
        Args:
            done: called with the id of each job whose result is delivered, or given up.
        """
        self._done = done
        self._under_way: dict[asyncio.Task[None], str] = {}

    def start(self, session: aiohttp.ClientSession, job_id: str, result: dict[str, Any]) -> None:
        """Deliver a result, without waiting for it.

        Args:
            session: with the platform's credentials.
            result: as the platform takes it: `{"output"?, "error"?, "stopPod"?}`.
        """
        task = asyncio.create_task(_deliver(session, job_id, result))
        self._under_way[task] = job_id
        task.add_done_callback(self._end)

    def is_delivering(self, job_id: str) -> bool:
        return job_id in self._under_way.values()

    def drop(self, job_id: str) -> bool:
        """Nobody waits for this result any more. Returns whether it was still under way."""
        tasks = [task for task, of_job in self._under_way.items() if of_job == job_id]
        for task in tasks:
            task.cancel()
        return bool(tasks)

    async def all_done(self) -> None:
        while self._under_way:
            await asyncio.wait(list(self._under_way))

    def _end(self, task: asyncio.Task[None]) -> None:
        job_id = self._under_way.pop(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the result is lost", exc_info=error, extra={"job_id": job_id})
        self._done(job_id)


async def _deliver(session: aiohttp.ClientSession, job_id: str, result: dict[str, Any]) -> None:
    url, extra = job_url(job_id), {"job_id": job_id}
    if url is None:
        log.error("there is no address for results: RUNPOD_WEBHOOK_POST_OUTPUT", extra=extra)
        return
    body = _body(result)
    began, refused_for = time.monotonic(), 0.0
    for tries in itertools.count(1):
        status, retry_after = await _post(session, url, body, job_id)
        elapsed = time.monotonic() - began
        told = status or "no answer"
        if status is not None and (status < 300 or status in ALREADY_HAS_A_RESULT):
            log.info("delivered at try %d", tries, extra=extra)
            return
        if status == 404 and tries >= UNKNOWN_JOB_TRIES:
            log.warning("the platform has no such job any more: result dropped", extra=extra)
            return
        refused_for = elapsed if _is_refusal(status) else 0.0
        if status == TOO_LARGE or refused_for > REFUSED_SECONDS:
            log.error("the platform refuses the result (%s)", told, extra=extra)
            result, began = _in_its_place(result, status, len(body)), time.monotonic()
            if (smaller := _body(result)) == body:
                return
            body = smaller
            continue
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (tries - 1), LONGEST_PAUSE_SECONDS)
        pause = max(pause, min(retry_after, KEPT_SECONDS / 2))
        if elapsed + pause > KEPT_SECONDS:
            log.error(
                "the result is lost: not delivered in %d tries (%s)", tries, told, extra=extra
            )
            return
        log.warning("not delivered (%s), again in %.1f s", told, pause, extra=extra)
        await asyncio.sleep(pause)


def _is_refusal(status: int | None) -> bool:
    return status is not None and 400 <= status < 500 and status not in PASSING


async def _post(
    session: aiohttp.ClientSession, url: str, body: bytes, job_id: str
) -> tuple[int | None, float]:
    """
    Returns:
        The platform's status, None without an answer, and how long it asks to wait.
    """
    try:
        async with session.post(
            url,
            data=body,
            # As the SDK sends it.
            headers={
                "charset": "utf-8",
                "Content-Type": "application/x-www-form-urlencoded",
                "X-Request-ID": quote(job_id),
            },
            timeout=aiohttp.ClientTimeout(total=POST_TIMEOUT_SECONDS),
        ) as response:
            wanted = response.headers.get("Retry-After", "")
            return response.status, float(wanted) if wanted.isdecimal() else 0.0
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None, 0.0


def _body(result: dict[str, Any]) -> bytes:
    try:
        # ASCII: an answer with half a character (a lone surrogate) can be encoded, too.
        return json.dumps(result, allow_nan=False).encode("ascii")
    except (TypeError, ValueError):
        log.exception("an answer that is not JSON")
        return _body({"error": "the worker failed at this job: its answer is not JSON"})


def _in_its_place(result: dict[str, Any], status: int | None, size_bytes: int) -> dict[str, Any]:
    """An error that tells the caller of a result that the platform does not take."""
    words = f"the platform refused the result of {size_bytes / 1e6:.1f} MB ({status})"
    instead = {
        "error": f"{words}; ask for fewer pictures (num_images) or smaller ones (height, width)"
    }
    return instead | {key: value for key, value in result.items() if key == "stopPod"}
