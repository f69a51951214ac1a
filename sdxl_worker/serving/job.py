"""One job, phase by phase."""

import base64
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.gpu import reset_peak_memory
from sdxl_worker.inputs.decoder_process import decode_apart
from sdxl_worker.inputs.fetch import fetch
from sdxl_worker.outputs.answer import build_output, check_expected_size, check_size
from sdxl_worker.outputs.upload import UploadFailure, destination, upload
from sdxl_worker.request import parse_request
from sdxl_worker.serving.ending import not_holding_the_end
from sdxl_worker.serving.logs import timed
from sdxl_worker.serving.slot import begin_next_job
from sdxl_worker.serving.start import ready_models
from sdxl_worker.serving.threads import in_thread, on_gpu_thread
from sdxl_worker.settings import load_settings

log = logging.getLogger(__name__)

# What the SDK calls with a job and gets the answer from.
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


async def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The output of a job: pictures, or the report of a check.

    When cancelled, it leaves the GPU thread within one denoising step.

    Raises:
        RequestError: the caller's mistake.
        ModelError: the models cannot be loaded.
    """
    job_id = str(job.get("id"))
    request = parse_request(job.get("input"))
    settled = request.model_dump(exclude={"image_url"})
    log.debug("request: %s", settled, extra={"job_id": job_id})

    settings = load_settings()
    where = destination(job, request, settings)
    models = await ready_models(settings)

    # torch and diffusers take seconds to import: a job that is refused need not wait for them.
    from sdxl_worker.drawing.stages import as_drawn, output_size_px, plan_stages, total_steps
    from sdxl_worker.serving.progress import Progress
    from sdxl_worker.serving.report import build_report

    stages = plan_stages(request, models)  # refuses before a picture is fetched
    request = as_drawn(request, stages)
    input_picture = None
    if request.image_url is not None:
        async with not_holding_the_end("the picture of image_url"):
            with timed("fetch", job_id):
                data = await fetch(request.image_url, "image_url")
            with timed("decode", job_id):
                input_picture = await decode_apart(
                    data, "image_url", height_px=request.height, width_px=request.width
                )
    if not request.check:
        width, height = output_size_px(stages, input_picture)
        check_expected_size(request.num_images, width * height, job_id)

    async with Progress(job, latent_rgb=models.latent_rgb if request.preview else None) as progress:
        pictures, generate_ms = await on_gpu_thread(
            _draw,
            job_id,
            time.perf_counter(),
            request,
            stages,
            models,
            input_picture,
            progress.on_step,
            step_cache_interval=settings.step_cache,
        )
        with timed("encode", job_id):
            if request.check:
                steps = total_steps(stages)
                return build_report(request, models, settings, pictures, generate_ms, steps)
            # Stand-in, for the benchmark of uploading.
            output = await in_thread(
                build_output,
                pictures,
                request,
                model_name=models.name,
                lossy=settings.lossy,
                metadata=settings.png_metadata,
            )
        if where is not None:
            begin_next_job()
            files = [base64.b64decode(uri.partition(",")[2]) for uri in output["images"]]
            with timed("upload", job_id):
                links = await upload(files, "image/png", "png", where, job_id)
            if failures := [link for link in links if isinstance(link, UploadFailure)]:
                raise RequestError(failures[0].cause)
            output = {**output, "images": links, "image_url": links[0]}
        check_size(output, job_id)
        return output


def _draw(
    job_id: str, queued_at: float, *arguments: Any, **options: Any
) -> tuple[list[Image.Image], float]:
    """On the GPU thread: what `generate` makes of its arguments, and the milliseconds it took."""
    from sdxl_worker.drawing.generate import generate

    reset_peak_memory()
    with timed("generate", job_id, queued_at=queued_at) as timing:
        pictures = generate(*arguments, **options)
    return pictures, timing.ms
