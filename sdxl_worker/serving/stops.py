"""Stop signals that come too early for the SDK.

The SDK stops a job by cancelling its task. It drops a signal for a job that has no task yet, which
was handed out within the last tenth of a second. Such a job would run to its end, and be paid for,
though nobody waits for it. Here the signal is kept until the handler is called.
"""

import asyncio
import time
from typing import Any

from sdxl_worker.serving.job import Handler

# Long enough for the SDK to start a job that it holds. A job with the same id that comes later was
# sent again, and has to run.
KEPT_SECONDS = 5.0


def heeding_early_stops(handler: Handler) -> Handler:
    """The handler, with the SDK's stop signals kept for jobs that have not begun."""
    from runpod.serverless.modules.rp_scale import JobScaler

    stopped_at: dict[str, float] = {}
    stop_running_job = JobScaler.stop_job

    async def stop_job(scaler: Any, job_id: str) -> bool:
        was_running: bool = await stop_running_job(scaler, job_id)
        if not was_running:
            _forget_old(stopped_at)
            stopped_at[job_id] = time.monotonic()
        return was_running

    async def handle(job: dict[str, Any]) -> dict[str, Any]:
        _forget_old(stopped_at)
        if stopped_at.pop(str(job.get("id")), None) is not None:
            raise asyncio.CancelledError
        return await handler(job)

    JobScaler.stop_job = stop_job
    return handle


def _forget_old(stopped_at: dict[str, float]) -> None:
    oldest = time.monotonic() - KEPT_SECONDS
    for job_id in [job_id for job_id, at in stopped_at.items() if at < oldest]:
        del stopped_at[job_id]
