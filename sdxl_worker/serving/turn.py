"""A job's turn: its pictures are drawn on the GPU thread, put back into what they are parts of, and
enlarged."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.together import kind_of
from sdxl_worker.gpu import reset_peak_memory
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.inputs.references import warnings_of_maps
from sdxl_worker.loading.models import Models
from sdxl_worker.serving.beside import steering_of, upscaled, with_depth_maps
from sdxl_worker.serving.logs import timed
from sdxl_worker.serving.preparing import Prepared
from sdxl_worker.serving.progress import Progress
from sdxl_worker.serving.start import put_on_card
from sdxl_worker.serving.threads import draw_on_gpu_thread, in_thread
from sdxl_worker.settings import Settings

# Of what LoRAs change, the share that rounding may lose without a word.
LOST_WORTH_TELLING = 0.01


@dataclass(frozen=True)
class Drawn:
    pictures: list[Image.Image]
    canvas: Canvas | None
    """What they are put back into."""
    ms: float
    """What they took."""
    lost: float
    """The share of what LoRAs change that rounding lost."""
    maps: Sequence[Image.Image]
    """Of `controlnet`."""


async def draw(
    prepared: Prepared, models: Models, settings: Settings, progress: Progress, job_id: str
) -> Drawn:
    """The pictures as the models draw them, alone or side by side with those of other jobs.

    Raises:
        RequestError: something that the drawing takes cannot be loaded.
    """
    kind = kind_of(
        prepared.request, prepared.stages, models, prepared.canvas, prepared.adapters, settings
    )
    work = functools.partial(
        _draw,
        prepared,
        models,
        settings,
        progress,
        job_id,
        queued_at=time.perf_counter(),
        shares_passes=kind is not None,
    )
    return await draw_on_gpu_thread(work, kind, settings.batch_jobs)


def _draw(
    prepared: Prepared,
    models: Models,
    settings: Settings,
    progress: Progress,
    job_id: str,
    *,
    queued_at: float,
    shares_passes: bool,
) -> Drawn:
    """On the GPU thread."""
    request, beside, canvas = prepared.request, prepared.beside, prepared.canvas
    models = put_on_card(models, settings, progress.on_loading)
    reset_peak_memory()
    references = with_depth_maps(request, beside, prepared.references, models, progress.on_loading)
    steering = steering_of(request, beside, references, models, progress.on_loading, progress.check)
    with timed("generate", job_id, queued_at=queued_at) as timing:
        if request.hires is not None and canvas is not None and steering.enlarge is not None:
            canvas = canvas.with_larger(request.hires.scale, steering.enlarge)
        pictures = generate(
            request,
            prepared.stages,
            models,
            canvas,
            progress.on_step,
            check=progress.check,
            steering=steering,
            adapters=prepared.adapters,
            step_cache_interval=settings.step_cache,
            shares_passes=shares_passes,
        )
    return Drawn(pictures, canvas, timing.ms, patches_of(models).lost, references.controls)


async def warnings_of_drawing(prepared: Prepared, drawn: Drawn, models: Models) -> list[str]:
    """What the caller may not expect of what was drawn, in words."""
    warnings = await in_thread(warnings_of_maps, prepared.request, drawn.maps)
    if models.dtype == torch.bfloat16 and drawn.lost > LOST_WORTH_TELLING:
        warnings.append(
            f"loras: rounding to bfloat16 lost {drawn.lost:.0%} of what they change; with "
            "DTYPE=float16 the worker would keep nearly all of it"
        )
    return warnings


async def finish(
    prepared: Prepared, drawn: Drawn, models: Models, progress: Progress, job_id: str
) -> list[Image.Image]:
    """The pictures as they are sent: whole, and as large as `upscale` asks for.

    Raises:
        RequestError: the upscaler cannot be loaded.
        PictureError: it gives no picture.
    """
    pictures = drawn.pictures
    if drawn.canvas is not None:
        pictures = await in_thread(_put_back, drawn.canvas, pictures, progress.check)
    if prepared.request.upscale is not None:
        with timed("upscale", job_id):
            pictures = await _upscaled(prepared, pictures, models, progress)
    return pictures


def _put_back(
    canvas: Canvas, pictures: list[Image.Image], check: Callable[[], None]
) -> list[Image.Image]:
    result = []
    for picture in pictures:
        check()
        result.append(canvas.put_back(picture))
    return result


async def _upscaled(
    prepared: Prepared, pictures: list[Image.Image], models: Models, progress: Progress
) -> list[Image.Image]:
    """Larger: by a network on the GPU thread, by Lanczos beside it."""
    enlarge = functools.partial(
        upscaled,
        prepared.request,
        prepared.beside,
        pictures,
        models,
        progress.on_loading,
        progress.check,
        progress.on_tile,
    )
    if prepared.beside.upscaler is None:
        return await in_thread(enlarge)
    return await draw_on_gpu_thread(enlarge, None, 1)
