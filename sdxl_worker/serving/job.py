"""One job, phase by phase."""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdxl_worker.field_types import TEXT_FIELDS
from sdxl_worker.limits import check_limits
from sdxl_worker.loading.models_by_name import names_of_models
from sdxl_worker.openai_images import (
    BESIDE_BYTES,
    ImagesCall,
    is_openai_call,
    list_models,
    parse_openai_call,
)
from sdxl_worker.outputs.answer import encode_maps, encode_pictures
from sdxl_worker.outputs.metadata import About
from sdxl_worker.outputs.result import build_result
from sdxl_worker.outputs.upload import Destination, UploadFailure, destination
from sdxl_worker.request import Request, parse_request
from sdxl_worker.serving.logs import timed
from sdxl_worker.serving.progress import Progress
from sdxl_worker.serving.safety import blanked, judge, warning_of_blanks
from sdxl_worker.serving.slot import begin_next_job
from sdxl_worker.serving.start import ready_models
from sdxl_worker.serving.storing import storage_checked, store
from sdxl_worker.serving.threads import in_thread
from sdxl_worker.settings import Settings, load_settings

if TYPE_CHECKING:
    from sdxl_worker.loading.models import Models
    from sdxl_worker.serving.preparing import Prepared

log = logging.getLogger(__name__)

# What the SDK calls with a job and gets the answer from.
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def check_input(job: dict[str, Any]) -> None:
    """All that can be said of a job before its turn, without fetching anything. `run_job` checks it
    as well.

    Raises:
        RequestError: the caller's mistake.
    """
    job_input = job.get("input")
    if not is_openai_call(job_input):
        check_limits(parse_request(job_input), load_settings())
    elif (call := parse_openai_call(job)) is not None:
        with call.in_its_words():
            check_limits(call.request, load_settings())


async def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The output of a job: pictures, or the report of a check.

    When cancelled, it leaves the GPU thread within one denoising step.

    Raises:
        RequestError: the caller's mistake.
        ModelError: the models cannot be loaded.
    """
    job_input = job.get("input")
    if not is_openai_call(job_input):
        return await _pictures(job, parse_request(job_input))
    call = parse_openai_call(job)
    if call is None:
        return await _models()
    with call.in_its_words():
        return await _pictures(job, call.request, call)


async def _models() -> dict[str, Any]:
    settings = load_settings()
    models = await ready_models(settings)
    return list_models(await in_thread(names_of_models, settings, models.model_dir))


async def _pictures(
    job: dict[str, Any], request: Request, call: ImagesCall | None = None
) -> dict[str, Any]:
    job_id = str(job.get("id"))
    settled = request.model_dump(
        exclude={
            *TEXT_FIELDS,
            *("image_url", "mask_url", "upload_urls"),
            *("loras", "embeddings", "controlnet", "ip_adapter"),
        }
    )
    log.debug("request: %s", settled, extra={"job_id": job_id})

    settings = load_settings()
    check_limits(request, settings)
    storage = None
    if call is None or call.wants_links:
        storage = destination(job, request, settings)
    async with Progress(job) as progress:
        models = await ready_models(settings, request.model, progress.on_loading)
        # A preview of what may yet be flagged would show it.
        if request.preview and not settings.safety_blank:
            progress.latent_rgb = models.latent_rgb
        return await _answered(job_id, request, settings, storage, models, progress, call)


async def _answered(
    job_id: str,
    request: Request,
    settings: Settings,
    storage: Destination | None,
    models: "Models",
    progress: Progress,
    call: ImagesCall | None,
) -> dict[str, Any]:
    # torch and diffusers take seconds to import: a job that is refused need not wait for them.
    from sdxl_worker.serving.preparing import prepare
    from sdxl_worker.serving.turn import draw, finish, warnings_of_drawing

    prepared = await prepare(
        request, settings, models, progress, call, job_id, is_stored=storage is not None
    )
    request, output_format = prepared.request, prepared.output_format
    drawn = await draw(prepared, models, settings, progress, job_id)
    warnings = [*prepared.warnings, *await warnings_of_drawing(prepared, drawn, models)]
    pictures = await finish(prepared, drawn, models, progress, job_id)
    if request.check:
        report = await _report(prepared, models, settings, pictures, drawn.ms)
        return report if storage is None else report | {"storage": await storage_checked(storage)}
    nsfw = None
    if settings.safety_checker is not None:
        with timed("judge", job_id):
            nsfw = await judge(pictures, settings.safety_checker, models, progress)
        if settings.safety_blank:
            pictures = blanked(pictures, nsfw)
            warnings += warning_of_blanks(nsfw)
    how: Any = {
        "output_format": output_format,
        "about": _about(prepared, models, settings),
        "check": progress.check,
    }
    with timed("encode", job_id):
        files = await in_thread(encode_pictures, pictures, request, **how)
        maps = await in_thread(encode_maps, drawn.maps if request.return_maps else ())
    begin_next_job()
    links: list[str | UploadFailure] = []
    if storage is not None:
        with timed("upload", job_id):
            links = await store(files, output_format, storage, job_id)
    output = await in_thread(
        build_result,
        pictures,
        files,
        links,
        request,
        job_id,
        how,
        warnings,
        BESIDE_BYTES if call is not None else 0,
        maps=maps,
        nsfw=nsfw,
    )
    if call is None:
        return output
    return call.body(
        output,
        size_px=pictures[0].size,
        output_format=output_format,
        model=models.name,
    )


async def _report(
    prepared: "Prepared",
    models: "Models",
    settings: Settings,
    pictures: list[Image.Image],
    generate_ms: float,
) -> dict[str, Any]:
    from sdxl_worker.drawing.stages import total_steps
    from sdxl_worker.serving.beside import what_is_there
    from sdxl_worker.serving.report import build_report

    there = await in_thread(what_is_there, settings, models)
    steps = total_steps(prepared.stages)
    return build_report(prepared.request, models, settings, pictures, generate_ms, steps, there)


def _about(prepared: "Prepared", models: "Models", settings: Settings) -> About:
    few_step = prepared.adapters.few_step
    return About(
        models.name,
        settings.metadata_level,
        models.hash,
        settings.lossy,
        prepared.adapter_files,
        few_step.family if few_step else None,
        tuple(files.folder.name for files in prepared.beside.controlnets),
    )
