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

Result = dict[str, Any] | asyncio.Task[dict[str, Any]]

KEPT_SECONDS = 120.0
# A gateway in trouble may answer anything for a moment. What is said for so long, without a break,
# is meant: that the job is not there, that the result is refused.
UNKNOWN_SECONDS = 20.0
REFUSED_SECONDS = 60.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
# 20 MB through a slow uplink.
POST_TIMEOUT_SECONDS = 120.0
ALREADY_HAS_A_RESULT = (409, 410)
UNKNOWN = 404
TOO_LARGE = 413
PASSING = (408, 425, 429)  # of the 4xx; all others but these say that the result is refused


def job_url(job_id: str) -> str | None:
    """Where the platform takes results and progress of this job, or None where there is none.

    It comes from the variables that the SDK posts results with. An id is the platform's word, and
    quoted, or "../x" would lead elsewhere.
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

    def start(self, session: aiohttp.ClientSession, job_id: str, result: Result) -> None:
        """Deliver a result, without waiting for it.

        Args:
            session: with the platform's credentials.
            result: as the platform takes it: `{"output"?, "error"?, "stopPod"?}`; or the task that
                still makes it, and that is dropped with it.
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


async def _deliver(session: aiohttp.ClientSession, job_id: str, result: Result) -> None:
    result = result if isinstance(result, dict) else await result
    url, extra = job_url(job_id), {"job_id": job_id}
    if url is None:
        log.error("there is no address for results: RUNPOD_WEBHOOK_POST_OUTPUT", extra=extra)
        return
    body, has_output = _body(result), "output" in result
    recycle = {key: result[key] for key in ("stopPod",) if key in result}
    del result  # some 20 MB
    began = time.monotonic()
    said_since: tuple[int | None, float] = (None, began)
    for tries in itertools.count(1):
        status, retry_after = await _post(session, url, body, job_id)
        now, told = time.monotonic(), status or "no answer"
        if status is not None and (status < 300 or status in ALREADY_HAS_A_RESULT):
            log.info("delivered at try %d", tries, extra=extra)
            return
        kind = _refusal(status)
        if kind != said_since[0]:
            said_since = (kind, now)
        said_for = now - said_since[1]
        if kind == UNKNOWN and said_for >= UNKNOWN_SECONDS:
            log.warning("the platform has no such job any more: result dropped", extra=extra)
            return
        if has_output and (status == TOO_LARGE or (kind and said_for >= REFUSED_SECONDS)):
            log.error("the platform refuses the result (%s)", told, extra=extra)
            error = _refused_error(status, len(body))
            body, has_output = _body({"error": error, **recycle}), False
            began, said_since = now, (None, now)
            continue
        left = began + KEPT_SECONDS - now
        if left <= 0:
            log.error("the result is lost: %d tries, the last: %s", tries, told, extra=extra)
            return
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (tries - 1), LONGEST_PAUSE_SECONDS)
        pause = min(max(pause, retry_after), left)
        log.warning("not delivered (%s), again in %.1f s", told, pause, extra=extra)
        await asyncio.sleep(pause)


def _refusal(status: int | None) -> int | None:
    """UNKNOWN, or 400 for all other ways to refuse a result; None for what passes."""
    if status is None or not 400 <= status < 500 or status in PASSING:
        return None
    return UNKNOWN if status == UNKNOWN else 400


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
            allow_redirects=False,  # would be followed without the body, and count as delivered
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


def _refused_error(status: int | None, size_bytes: int) -> str:
    """For the caller, of a result that the platform does not take."""
    return (
        f"the platform refused the result of {size_bytes / 1e6:.1f} MB ({status}); ask for smaller "
        'files (output_format "jpeg"), links (upload_urls), or fewer pictures (num_images)'
    )
