"""Entry point: `python handler.py`, on Runpod and on a laptop.

Importing this module loads and starts nothing. The models are loaded by `main`, or by the first
job where there is no `main`, as in a test.
"""

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from sdxl_worker import command_line
from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.inputs import load_image
from sdxl_worker.outputs import build_output
from sdxl_worker.request import parse_request
from sdxl_worker.settings import load_settings

log = logging.getLogger("sdxl_worker")

P = ParamSpec("P")
T = TypeVar("T")

# The GPU is used by this thread alone, one picture after the other: neither schedulers nor
# pipelines bear two at once, and the event loop stays free for the platform.
_gpu_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one job.

    Returns:
        `{"images": [...], "image_url": ..., "seed": ...}`, or `{"error": "<one string>"}`, with
        `"refresh_worker": True` beside it when this process can use its GPU no more.
    """
    try:
        return await _run(job)
    except (RequestError, ModelError) as error:
        return {"error": str(error)}
    except Exception as error:
        log.exception("job %s failed", job.get("id"))
        return await _on_gpu_thread(_describe_failure, error)


async def _run(job: dict[str, Any]) -> dict[str, Any]:
    # torch and diffusers take seconds to import: a job that is refused need not wait for them.
    request = parse_request(job.get("input"))
    from sdxl_worker.generate import choose_mode, generate
    from sdxl_worker.models import load_models

    settings = load_settings()
    models = await _on_gpu_thread(load_models, settings)
    choose_mode(request, models)  # refuses, while the picture is not fetched yet
    input_picture = await asyncio.to_thread(load_image, request)
    pictures = await _on_gpu_thread(generate, request, models, input_picture)
    return await asyncio.to_thread(
        build_output,
        pictures,
        request,
        model_name=models.name,
        metadata=settings.png_metadata,
    )


def _describe_failure(error: Exception) -> dict[str, Any]:
    """What the caller may know of a failure that is not the caller's: no traceback, no paths."""
    import torch

    from sdxl_worker.models import gpu_is_broken

    if gpu_is_broken():
        return {
            "error": "the worker's GPU failed and the worker is being replaced; send the job again",
            "refresh_worker": True,
        }
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return {
            "error": "not enough GPU memory for this job; ask for fewer or smaller pictures "
            "(num_images, height, width)"
        }
    return {
        "error": f"the worker failed at this job ({type(error).__name__}); its log, under the "
        "job's id, says where"
    }


async def _on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    call = functools.partial(function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_gpu_thread, call)


def main() -> None:
    """Load the models, then hand over to the SDK: one local job, its test server, or the queue."""
    sys.argv[1:], is_local_job = command_line.prepare(sys.argv[1:])
    try:
        settings = load_settings()
        from sdxl_worker.models import load_models

        load_models(settings)
    except ModelError as error:
        sys.exit(f"The worker cannot start. {error}")

    if os.environ.get("BUCKET_ENDPOINT_URL"):
        log.warning("BUCKET_ENDPOINT_URL is not used yet: answers hold the pictures themselves")

    import runpod

    serve = command_line.saving(handler) if is_local_job else handler
    runpod.serverless.start({"handler": serve})


if __name__ == "__main__":
    main()
