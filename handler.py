"""Entry point: `python handler.py`, on Runpod and on a laptop.

Importing this module loads and starts nothing. `main` prepares the models; where it does not
run, as in a test, the first job prepares them.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
from typing import Any

from sdxl_worker.errors import ModelError, PictureError, RequestError
from sdxl_worker.serving import command_line
from sdxl_worker.serving.job import run_job
from sdxl_worker.serving.job_bar import loading_shown
from sdxl_worker.serving.logs import set_up_logging
from sdxl_worker.serving.orphans import leave_no_orphans
from sdxl_worker.serving.slot import next_job_has_begun
from sdxl_worker.serving.start import start
from sdxl_worker.serving.threads import on_gpu_thread
from sdxl_worker.settings import load_settings

log = logging.getLogger("sdxl_worker")


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one job.

    Returns:
        `{"images": [...], "image_url": ..., "seed": ...}`, or the report of a check, or
        `{"error": "<one string>"}`, with `"refresh_worker": True` beside it when this process can
        no longer use its GPU.
    """
    extra = {"job_id": job.get("id")}
    try:
        return await run_job(job)
    except (RequestError, ModelError) as error:
        log.info("refused", extra=extra)
        return {"error": str(error)}
    except PictureError as error:
        log.error("no picture", extra=extra)
        return {"error": str(error)}
    except BaseException as error:
        # Only the task itself tells whether the job was stopped: inside it, anything can be raised.
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            log.info("stopped", extra=extra)
            raise
        log.exception("failed", extra=extra)
        # Nothing can be waited for in a closed coroutine; and whatever failed beside the next job
        # has nothing to do with the GPU, which that one may use for minutes.
        if isinstance(error, GeneratorExit) or next_job_has_begun():
            return _failed(error)
        try:
            return await on_gpu_thread(_describe_failure, error)
        except Exception:
            log.exception("and so did the look at the GPU", extra=extra)
            return _failed(error)


def _describe_failure(error: BaseException) -> dict[str, Any]:
    """The answer to a failure that is not the caller's mistake: no traceback, no paths."""
    from sdxl_worker import gpu

    if gpu.is_broken():
        return {
            "error": "the worker's GPU failed and the worker is being replaced; send the job again",
            "refresh_worker": True,
        }
    if gpu.is_out_of_memory(error):
        # The failed pass's tensors are free by now: the GPU thread clears the frames of an error.
        gpu.free_memory()
        return {
            "error": "not enough GPU memory for this job; ask for fewer or smaller pictures "
            "(num_images, height, width)"
        }
    return _failed(error)


def _failed(error: BaseException) -> dict[str, Any]:
    return {
        "error": f"the worker failed at this job ({type(error).__name__}); its log, under the "
        "job's id, says where"
    }


def main() -> None:
    """Prepare the models and hand over to the SDK: for one local job, a server, or the queue."""
    # The kernel drops unhandled signals to process 1, as in a container. Later the SDK handles it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    set_up_logging()
    leave_no_orphans()
    sys.argv[1:], place = command_line.prepare(sys.argv[1:])
    sdk_checks_done = threading.Event()

    if place is not command_line.Place.QUEUE:
        sdk_checks_done.set()  # there are none

    try:
        settings = load_settings()
        # The checks synchronize the GPU, which is forbidden while CUDA graphs are recorded, and
        # time a product, which would wait for whatever is drawn.
        models_start = start(settings, before_drawing=sdk_checks_done.wait)

        import runpod  # takes more than a second; the models load meanwhile

        if place is not command_line.Place.QUEUE:
            with loading_shown():
                models_start.result()
    except ModelError as error:
        sys.exit(f"The worker cannot start. {error}")

    async def models_draw() -> None:
        sdk_checks_done.set()
        await asyncio.wrap_future(models_start)

    def come_after_the_sdk_checks() -> None:
        runpod.serverless.register_fitness_check(models_draw)

    # On the platform a worker whose check fails is reported unhealthy and takes no job. The SDK
    # runs checks one by one, its own after those registered before it begins. So ours is registered
    # once it has begun, and comes last: the models load while the SDK's own checks run.
    runpod.serverless.register_fitness_check(come_after_the_sdk_checks)
    if place is command_line.Place.QUEUE:
        # It imports runpod.
        from sdxl_worker.serving.scaler import take_the_place_of_the_sdks_scaler

        take_the_place_of_the_sdks_scaler()
    is_local_job = place is command_line.Place.LOCAL_JOB
    try:
        runpod.serverless.start(
            {
                "handler": command_line.saving(handler) if is_local_job else handler,
                "concurrency_modifier": lambda _: settings.jobs_at_once,
            }
        )
    finally:
        sdk_checks_done.set()  # or a worker that is told to end early would wait for them for ever


if __name__ == "__main__":
    main()
