"""The SDK's loop over the platform's jobs, mended where it loses jobs or ends the worker.

`runpod.serverless.start` makes a `JobScaler` and lets nobody choose another one: of its
configuration, "jobs_fetcher" and "jobs_handler" are heeded only where there is no platform. So this
subclass, which sets what they would set, takes its place. tests/serving/test_scaler.py fails where
another version of the SDK is built otherwise.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
from typing import Any

from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_scale
from runpod.serverless.modules.rp_job import _job_get_url

from sdxl_worker.host_memory import give_back_host_memory
from sdxl_worker.serving import slot
from sdxl_worker.serving.delivery import Deliveries
from sdxl_worker.serving.ending import hurry

log = logging.getLogger(__name__)

# An answer without a job that comes sooner was not held back by the platform.
HELD_SECONDS = 0.5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
# How often a full worker looks whether it may take another job.
PLACE_LOOKED_FOR_SECONDS = 0.02
# Jobs that may wait, for storage or for the platform, before the worker takes no more.
MAX_WAITING_RESULTS = 8
MAX_ID_CHARACTERS = 500
# What the platform is known to send beside the id.
JOB_KEYS = ("input", "webhook", "policy", "s3Config", "batchId")
# How long a stop is remembered for a job that has not begun: long enough for the SDK to begin a
# job that it holds. One with the same id that comes later was sent again, and has to run.
STOP_KEPT_SECONDS = 5.0


def take_the_place_of_the_sdks_scaler() -> None:
    rp_scale.JobScaler = WorkerScaler


class WorkerScaler(rp_scale.JobScaler):
    """Takes jobs, runs them with the handler, delivers their results."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_fetcher = self._take
        self.jobs_handler = self._run
        self._deliveries = Deliveries(done=self._delivered)
        self._pause_seconds = 0.0
        self._stopped_at: dict[str, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """As the SDK's, which goes on to wait for stops, up to 90 seconds, once no job is left."""
        async with AsyncClientSession() as session:
            stopping = asyncio.create_task(self.monitor_stop_signals(session))
            await asyncio.gather(self.get_jobs(session), self.run_jobs(session))
            stopping.cancel()

    # Taking.

    async def get_jobs(self, session: Any) -> None:
        """Until the worker is told to end; then what that left to do."""
        self._loop = asyncio.get_running_loop()
        await super().get_jobs(session)
        # The SDK's other loop may have ended before the last poll brought a job.
        await self.run_jobs(session)

    async def run_jobs(self, session: Any) -> None:
        """Until the worker is told to end and has no job; then until all is delivered."""
        await super().run_jobs(session)
        await self._deliveries.all_done()

    async def set_scale(self) -> None:
        """As the SDK's; then until the worker may take a job. The SDK would sleep for a second, in
        which a place that becomes free stays empty."""
        await super().set_scale()
        while self.is_alive() and self.current_occupancy() >= self.current_concurrency:
            await asyncio.sleep(PLACE_LOOKED_FOR_SECONDS)

    async def _take(self, session: Any, count: int) -> list[dict[str, Any]]:
        """Jobs that can be run, whatever the platform says.

        Where it answers at once and has none, or fails, it is asked again after a pause: the SDK
        would ask a thousand times a second.
        """
        if not self.is_alive():  # told to end while it looked for a place
            return []
        began = time.monotonic()
        try:
            jobs = await self._ask(session, count)
        except TooManyRequests:
            raise  # the SDK waits by itself
        except Exception:
            await self._wait()
            raise
        if jobs or time.monotonic() - began > HELD_SECONDS:
            self._pause_seconds = 0.0
        else:
            await self._wait()
        return jobs

    async def _wait(self) -> None:
        longer = max(FIRST_PAUSE_SECONDS, 2 * self._pause_seconds)
        self._pause_seconds = min(longer, LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(self._pause_seconds)

    async def _ask(self, session: Any, count: int) -> list[dict[str, Any]]:
        """As the SDK's `get_job`, which fails at a job without input, and loses it."""
        async with session.get(_job_get_url(count)) as response:
            if response.status == 429:
                raise TooManyRequests(response.request_info, response.history, status=429)
            if response.status == 400:  # "expected when FlashBoot is enabled", says the SDK
                return []
            response.raise_for_status()
            if response.status == 204 or response.content_type != "application/json":
                return []
            text = await response.text(errors="replace")
        try:
            answer = json.loads(text, parse_int=_int)
        except (ValueError, RecursionError):
            for job_id in _ids_in(text):
                error = "the job cannot be read: its JSON is not valid, or nested too deeply"
                self._deliveries.start(session, job_id, {"error": error})
            return []
        jobs: list[dict[str, Any]] = []
        for one in answer if isinstance(answer, list) else [answer]:
            job = _runnable(one)
            if job is None:
                log.error("the platform handed out something that is no job, or has no id: dropped")
            elif await self._is_here(job["id"]) or job["id"] in [other["id"] for other in jobs]:
                log.warning("handed out again, dropped", extra={"job_id": job["id"]})
            else:
                jobs.append(job)
        return jobs

    async def _is_here(self, job_id: str) -> bool:
        """Whether a job waits, runs or is delivered: its one answer will do. The SDK, too, tells
        jobs by their ids alone."""
        task = self.jobs_tasks.get(job_id)
        if task is not None and task.cancelling():
            await asyncio.wait([task])  # stopped, and handed out to run anew
        return self.job_progress.get(job_id) is not None

    # Running.

    async def handle_job(self, session: Any, job: dict[str, Any]) -> None:
        try:
            await super().handle_job(session, job)
        finally:
            # Until its result is delivered, the pings name a job, or the platform would give it to
            # another worker.
            if self._deliveries.is_delivering(job["id"]):
                self.job_progress.add(job)

    def _delivered(self, job_id: str) -> None:
        self.job_progress.remove(job_id)
        asyncio.get_running_loop().run_in_executor(None, give_back_host_memory)

    def current_occupancy(self) -> int:
        """Jobs that keep the worker from taking others. Those that left their slot do not, as long
        as they are few: each holds its pictures. The SDK counts those of its queue twice, which are
        in progress from when they are taken."""
        waiting = sum(
            self._deliveries.is_delivering(job.id) and job.id not in self.jobs_tasks
            for job in self.job_progress
        )
        return int(self.job_progress.get_job_count()) - min(waiting, MAX_WAITING_RESULTS)

    async def _run(self, session: Any, config: dict[str, Any], job: dict[str, Any]) -> None:
        self._forget_old_stops()
        if self._stopped_at.pop(job["id"], None) is not None:
            return
        left = asyncio.Event()
        token = slot.left.set(left)
        answering = asyncio.create_task(self._answer(config["handler"], job))
        slot.left.reset(token)
        answering.add_done_callback(lambda _: left.set())
        try:
            await left.wait()
        except asyncio.CancelledError:
            answering.cancel()
            await asyncio.wait([answering])
            raise
        self._deliveries.start(session, job["id"], answering)

    async def _answer(self, handler: Any, job: dict[str, Any]) -> dict[str, Any]:
        """The result of a job, as the platform takes it."""
        output = await handler(job)
        result: dict[str, Any] = {}
        if error := output.pop("error", None):
            result["error"] = error
        if output.pop("refresh_worker", None):
            result["stopPod"] = True
            self.kill_worker()  # the next job would fail as this one did
        if output or not result:
            result["output"] = output
        return result

    # Stopping.

    async def stop_job(self, job_id: str) -> bool:
        """A stop for a job that has not begun is remembered. The SDK drops it, and the job, handed
        out within the last tenth of a second, would run to its end and be paid for."""
        was_delivered: bool = self._deliveries.drop(job_id)
        was_running: bool = await super().stop_job(job_id)
        if was_delivered or was_running:
            return True
        self._forget_old_stops()
        self._stopped_at[job_id] = time.monotonic()
        return False

    def kill_worker(self) -> None:
        """Called from a signal handler: the worker ends once its jobs have."""
        super().kill_worker()
        log.info("told to end; jobs that are left: %d", self.job_progress.get_job_count())
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(hurry)

    def _forget_old_stops(self) -> None:
        oldest = time.monotonic() - STOP_KEPT_SECONDS
        self._stopped_at = {job_id: at for job_id, at in self._stopped_at.items() if at > oldest}


def _int(digits: str) -> int | float:
    """Python refuses numbers of thousands of digits, and with them the job that has one."""
    try:
        return int(digits)
    except ValueError:
        return float("-inf" if digits.startswith("-") else "inf")


def _runnable(job: object) -> dict[str, Any] | None:
    """The job in a form that the SDK can keep; None where it has no id to answer under."""
    if not isinstance(job, dict):
        return None
    job_id = job.get("id")
    if isinstance(job_id, int) and not isinstance(job_id, bool):
        job_id = str(job_id)
    if not isinstance(job_id, str) or not 0 < len(job_id) <= MAX_ID_CHARACTERS:
        return None
    # No address can have these in its path: half a character, and steps through folders.
    if any("\ud800" <= letter <= "\udfff" for letter in job_id) or job_id in (".", ".."):
        return None
    # The SDK makes attributes of all keys. The platform leaves out an input without fields.
    return {"input": {}, **{key: job[key] for key in JOB_KEYS if key in job}, "id": job_id}


def _ids_in(text: str) -> list[str]:
    """The ids of the jobs in an answer that cannot be read as a whole."""
    ids, depth = [], 0
    depth_of_jobs = 2 if text.lstrip().startswith("[") else 1
    parts = re.findall(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]', text)
    for name, colon, value in zip(parts, parts[1:], parts[2:], strict=False):
        depth += (name in ("{", "[")) - (name in ("}", "]"))
        if depth == depth_of_jobs and (name, colon) == ('"id"', ":") and value.startswith('"'):
            with contextlib.suppress(ValueError):
                ids.append(json.loads(value, strict=False))
    return [job["id"] for one in ids if (job := _runnable({"id": one}))]
