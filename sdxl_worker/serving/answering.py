"""A job's answer, whatever becomes of the job, and what to call the outcome."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sdxl_worker.errors import (
    ModelError,
    OpenAIRequestError,
    PictureError,
    RequestError,
    ToldToEndError,
)
from sdxl_worker.serving.job import check_input, run_job
from sdxl_worker.serving.slot import next_job_has_begun
from sdxl_worker.serving.threads import on_gpu_thread

log = logging.getLogger("sdxl_worker")

# OpenAI's name of a caller's mistake, without which its clients take any failure for the server's.
INVALID_REQUEST = "invalid_request_error"
GPU_FAILED = "the worker's GPU failed and the worker is being replaced; send the job again"


class Outcome(Enum):
    DONE = "done"
    REFUSED = "refused"
    """The caller's mistake."""
    STOPPED = "stopped"
    """The worker was told to end."""
    NO_MODEL = "no_model"
    NO_PICTURE = "no_picture"
    OUT_OF_MEMORY = "out_of_memory"
    GPU_BROKEN = "gpu_broken"
    """This process has to be replaced."""
    FAILED = "failed"
    """For another reason, which the log has."""


@dataclass(frozen=True)
class Answer:
    output: dict[str, Any]
    """`{"images": [...], "image_url": ..., "seed": ...}`, or the report of a check, or
    `{"error": "<one string>"}`, with `"refresh_worker": True` beside it when this process can
    no longer use its GPU. Of a call of OpenAI's API: its body, or `{"error": ...}`, with
    `"error_type"` beside it where the caller has to change something."""
    outcome: Outcome


Answering = Callable[[dict[str, Any]], Coroutine[Any, Any, Answer]]


def refusal(job: dict[str, Any]) -> Answer | None:
    """Of a job whose input is wrong, its answer, before its turn; None: nothing is known to be."""
    try:
        check_input(job)
    except RequestError as error:
        log.info("refused", extra={"job_id": job.get("id")})
        return _refused(error)
    return None


async def answer(job: dict[str, Any]) -> Answer:
    """Run one job. Only where it is cancelled, there is no answer."""
    extra = {"job_id": job.get("id")}
    try:
        return Answer(await run_job(job), Outcome.DONE)
    except ToldToEndError as error:
        log.info("stopped", extra=extra)
        return _error(Outcome.STOPPED, str(error))
    except RequestError as error:
        log.info("refused", extra=extra)
        return _refused(error)
    except ModelError as error:
        log.info("refused", extra=extra)
        return _error(Outcome.NO_MODEL, str(error))
    except PictureError as error:
        log.error("no picture", extra=extra)
        return _error(Outcome.NO_PICTURE, str(error))
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
            return await on_gpu_thread(_describe_failure, error, job.get("input"))
        except Exception:
            log.exception("and so did the look at the GPU", extra=extra)
            return _failed(error)


def _refused(error: RequestError) -> Answer:
    whose = {"error_type": INVALID_REQUEST} if isinstance(error, OpenAIRequestError) else {}
    return Answer({"error": str(error), **whose}, Outcome.REFUSED)


def _describe_failure(error: BaseException, job_input: Any) -> Answer:
    """The answer to a failure that is not the caller's mistake: no traceback, no paths."""
    from sdxl_worker import gpu

    if gpu.is_broken():
        return Answer({"error": GPU_FAILED, "refresh_worker": True}, Outcome.GPU_BROKEN)
    if gpu.is_out_of_memory(error):
        # The failed pass's tensors are free by now: the GPU thread clears the frames of an error.
        gpu.free_memory()
        return _error(
            Outcome.OUT_OF_MEMORY,
            "not enough GPU memory for this job; ask for fewer or smaller pictures "
            f"(num_images, height, width){_or_without_networks(job_input)}",
        )
    return _failed(error)


def _or_without_networks(job_input: Any) -> str:
    """Advice for a job whose networks beside the models may be what does not fit."""
    fields = job_input.get("openai_input", job_input) if isinstance(job_input, dict) else None
    if not isinstance(fields, dict):
        return ""
    asked = [name for name in ("controlnet", "ip_adapter") if fields.get(name)]
    return f", or leave out {' and '.join(asked)}" if asked else ""


def _failed(error: BaseException) -> Answer:
    return _error(
        Outcome.FAILED,
        f"the worker failed at this job ({type(error).__name__}); its log, under the "
        "job's id, says where",
    )


def _error(outcome: Outcome, message: str) -> Answer:
    return Answer({"error": message}, outcome)
