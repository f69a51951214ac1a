"""One job, stage by stage."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from PIL import Image

from sdxl_worker.gpu import on_gpu_thread, reset_peak_memory
from sdxl_worker.inputs import load_image
from sdxl_worker.logs import stage
from sdxl_worker.outputs import build_output, check_expected_size, check_size
from sdxl_worker.request import parse_request
from sdxl_worker.settings import load_settings

log = logging.getLogger(__name__)

# What the SDK calls with a job, and takes the answer of.
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


async def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The output of a job: pictures, or the report of a check.

    Cancelled, it leaves the GPU thread within one denoising step.

    Raises:
        RequestError: the caller's mistake.
        ModelError: the models cannot be loaded.
    """
    job_id = str(job.get("id"))
    request = parse_request(job.get("input"))
    settled = request.model_dump(exclude={"image_url"})
    log.debug("request: %s", settled, extra={"job_id": job_id})

    # torch and diffusers take seconds to import: a job that is refused need not wait for them.
    from sdxl_worker.check import build_report
    from sdxl_worker.generate import choose_mode, generate, picture_size_px, planned_steps
    from sdxl_worker.models import load_models
    from sdxl_worker.progress import Progress

    settings = load_settings()
    models = await asyncio.to_thread(load_models, settings)
    mode = choose_mode(request, models)  # refuses, while the picture is not fetched yet
    input_picture = None
    if request.image_url is not None:
        with stage("fetch", job_id):
            input_picture = await asyncio.to_thread(load_image, request)
    if not request.check:
        width, height = picture_size_px(request, models, input_picture)
        check_expected_size(request, width * height, job_id)

    queued_at = time.perf_counter()

    def draw() -> tuple[list[Image.Image], float]:
        reset_peak_memory()
        with stage("generate", job_id, queued_at=queued_at) as timing:
            pictures = generate(request, models, input_picture, progress.on_step)
        return pictures, timing.ms

    async with Progress(
        job, preview_map=models.preview_map if request.preview else None
    ) as progress:
        pictures, generate_ms = await on_gpu_thread(draw)
        with stage("encode", job_id):
            if request.check:
                steps = planned_steps(request, mode)
                return build_report(request, models, pictures, generate_ms=generate_ms, steps=steps)
            output = await asyncio.to_thread(
                build_output,
                pictures,
                request,
                model_name=models.name,
                metadata=settings.png_metadata,
                quantization=models.quantization,
            )
            check_size(output, job_id)
            return output
