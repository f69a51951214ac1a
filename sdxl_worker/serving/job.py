"""One job, phase by phase."""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.few_step import warnings_of_settings, with_settings_of
from sdxl_worker.field_types import MAX_SIDE_PX, TEXT_FIELDS, OutputFormat
from sdxl_worker.gpu import reset_peak_memory
from sdxl_worker.inputs.adapter_files import AdapterFile, fetch_adapters
from sdxl_worker.inputs.canvas import Canvas, prepare_canvas, with_holes_filled
from sdxl_worker.inputs.decoder_process import decode_apart, decode_mask_apart
from sdxl_worker.inputs.fetch import fetch
from sdxl_worker.inputs.fitting import MAX_AUTOMATIC_SIDE_PX
from sdxl_worker.inputs.references import (
    NO_REFERENCES,
    References,
    addresses_of,
    decode_references,
    prepare_references,
    references_of,
    warnings_of_maps,
)
from sdxl_worker.limits import check_limits
from sdxl_worker.loading.models_by_name import names_of_models
from sdxl_worker.openai_images import (
    BESIDE_BYTES,
    ImagesCall,
    is_openai_call,
    list_models,
    parse_openai_call,
)
from sdxl_worker.outputs.answer import (
    build_output,
    data_uri,
    encode_maps,
    encode_pictures,
    told_beside,
)
from sdxl_worker.outputs.files import MEDIA_TYPES
from sdxl_worker.outputs.metadata import About
from sdxl_worker.outputs.size_guard import check_expected_size, fit, fits_beside_links
from sdxl_worker.outputs.upload import (
    Destination,
    UploadFailure,
    check_storage,
    destination,
    upload,
)
from sdxl_worker.request import Request, parse_request
from sdxl_worker.serving.ending import not_holding_the_end
from sdxl_worker.serving.logs import timed
from sdxl_worker.serving.progress import Progress
from sdxl_worker.serving.safety import blanked, judge, warning_of_blanks
from sdxl_worker.serving.slot import begin_next_job
from sdxl_worker.serving.start import put_on_card, ready_models
from sdxl_worker.serving.threads import draw_on_gpu_thread, in_thread
from sdxl_worker.settings import Settings, load_settings
from sdxl_worker.wording import without_secrets

if TYPE_CHECKING:
    from sdxl_worker.drawing.stages import Stage
    from sdxl_worker.loading.models import Models
    from sdxl_worker.serving.beside import Beside

log = logging.getLogger(__name__)

# Of what LoRAs change, the share that rounding may lose without a word.
LOST_WORTH_TELLING = 0.01
# Control pictures and pictures as prompts that are in memory as they were sent.
FILES_AT_ONCE = 2
# What the SDK calls with a job and gets the answer from.
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


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
    import torch

    from sdxl_worker.adapters.of_request import read_adapters
    from sdxl_worker.drawing.control import warnings_of_controls
    from sdxl_worker.drawing.prompts import Texts, warnings_of
    from sdxl_worker.drawing.stages import (
        as_drawn,
        drawn_sizes_px,
        final_size_px,
        plan_stages,
        total_steps,
    )
    from sdxl_worker.drawing.together import kind_of
    from sdxl_worker.serving.beside import find_beside, what_is_there
    from sdxl_worker.serving.report import build_report

    plan_stages(request, models)  # refuses before anything is fetched
    # It reads folders and headers of files, which may be on a network volume.
    beside = await in_thread(find_beside, request, settings, models)
    adapter_files = await _adapter_files(request, settings, progress, job_id)
    adapters = await in_thread(read_adapters, request, adapter_files, models)
    request = with_settings_of(request, adapters.few_step, models.scheduler_config)
    if call is not None:
        request = call.with_quality(request, settings)
    stages = plan_stages(request, models)
    request = as_drawn(request, stages)
    canvas = None
    if request.image_url is not None:
        async with not_holding_the_end("the picture of image_url"):
            takes_holes = call is not None and call.takes_holes
            canvas = await _canvas(request, models.native_size_px, job_id, takes_holes=takes_holes)
        if canvas.mask is not None and not request.is_masked:
            request = request.model_copy(update={"mask_from_alpha": True})
    output_format = request.output_format or settings.default_output_format
    width, height = final_size_px(request, stages, canvas)
    if not request.check and storage is None:
        count = len(request.controlnet or ()) if request.return_maps else 0
        drawn_width, drawn_height = drawn_sizes_px(stages, canvas)[0]
        check_expected_size(
            request,
            width * height,
            output_format,
            job_id,
            map_pixels=count * drawn_width * drawn_height,
        )

    references = await _references(request, stages, canvas, beside, job_id)
    told = warnings_of_settings(request, adapters.few_step)
    told += warnings_of(Texts.of(request), adapters.embeddings)
    told += warnings_of_controls(request, stages)
    told += call.warnings if call is not None else []
    kind = kind_of(request, stages, models, canvas, adapters, settings)
    draw = functools.partial(
        _draw,
        job_id,
        time.perf_counter(),
        models,
        settings,
        progress,
        request,
        stages,
        canvas,
        beside,
        references,
        adapters=adapters,
        step_cache_interval=settings.step_cache,
        shares_passes=kind is not None,
    )
    drawn = await draw_on_gpu_thread(draw, kind, settings.batch_jobs)
    pictures, canvas = drawn.pictures, drawn.canvas
    told += await in_thread(warnings_of_maps, request, drawn.maps)
    if models.dtype == torch.bfloat16 and drawn.lost > LOST_WORTH_TELLING:
        told.append(
            f"loras: rounding to bfloat16 lost {drawn.lost:.0%} of what they change; with "
            "DTYPE=float16 the worker would keep nearly all of it"
        )
    if canvas is not None:
        pictures = await in_thread(_put_back, canvas, pictures, progress.check)
    if request.upscale is not None:
        with timed("upscale", job_id):
            pictures = await _upscaled(request, beside, pictures, models, progress)
    if request.check:
        steps = total_steps(stages)
        there = await in_thread(what_is_there, settings, models)
        report = build_report(request, models, settings, pictures, drawn.ms, steps, there)
        return report if storage is None else {**report, "storage": await _checked(storage)}
    nsfw = None
    if settings.safety_checker is not None:
        with timed("judge", job_id):
            nsfw = await judge(pictures, settings.safety_checker, models, progress)
        if settings.safety_blank:
            pictures = blanked(pictures, nsfw)
            told += warning_of_blanks(nsfw)
    how: Any = {
        "output_format": output_format,
        "about": About(
            models.name,
            settings.metadata_level,
            models.hash,
            settings.lossy,
            adapter_files,
            adapters.few_step.family if adapters.few_step else None,
            tuple(files.folder.name for files in beside.controlnets),
        ),
        "check": progress.check,
    }
    with timed("encode", job_id):
        files = await in_thread(encode_pictures, pictures, request, **how)
        maps = await in_thread(encode_maps, drawn.maps if request.return_maps else ())
    begin_next_job()
    links: list[str | UploadFailure] = []
    if storage is not None:
        with timed("upload", job_id):
            links = await _upload(files, output_format, storage, job_id)
    wrapping_bytes = BESIDE_BYTES if call is not None else 0
    output = await in_thread(
        _answer,
        pictures,
        files,
        links,
        request,
        job_id,
        how,
        told,
        wrapping_bytes,
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


async def _adapter_files(
    request: Request, settings: Settings, progress: Progress, job_id: str
) -> dict[str, AdapterFile]:
    """The files of LoRAs and embeddings, by the place of their path in the request.

    Raises:
        RequestError: one cannot be had.
    """
    paths = {
        f"{field}[{i}].path": one.path
        for field in ("loras", "embeddings")
        for i, one in enumerate(getattr(request, field) or ())
    }
    if not paths:
        return {}
    with timed("fetch_adapters", job_id):
        async with not_holding_the_end("the LoRAs and embeddings"):
            return await fetch_adapters(paths, settings, progress.on_bytes)


def _put_back(
    canvas: Canvas, pictures: list[Image.Image], check: Callable[[], None]
) -> list[Image.Image]:
    result = []
    for picture in pictures:
        check()
        result.append(canvas.put_back(picture))
    return result


async def _upscaled(
    request: Request,
    beside: "Beside",
    pictures: list[Image.Image],
    models: "Models",
    progress: Progress,
) -> list[Image.Image]:
    """The finished pictures, larger: by a network on the GPU thread, by Lanczos beside it."""
    from sdxl_worker.serving.beside import upscaled

    enlarge = functools.partial(
        upscaled,
        request,
        beside,
        pictures,
        models,
        progress.on_loading,
        progress.check,
        progress.on_tile,
    )
    if beside.upscaler is None:
        return await in_thread(enlarge)
    return await draw_on_gpu_thread(enlarge, None, 1)


async def _checked(storage: Destination) -> str:
    try:
        async with not_holding_the_end("the storage"):
            return await check_storage(storage)
    except RequestError:
        return "not checked: the worker was told to end"


async def _upload(
    files: list[bytes], output_format: OutputFormat, storage: Destination, job_id: str
) -> list[str | UploadFailure]:
    """Of each file its link, or why there is none."""
    outcomes: list[str | UploadFailure] = [UploadFailure("the worker was told to end")] * len(files)
    with contextlib.suppress(RequestError):  # what is made still reaches the caller
        async with not_holding_the_end("the upload"):
            await upload(
                files,
                MEDIA_TYPES[output_format],
                output_format,
                storage,
                job_id,
                outcomes=outcomes,
            )
    return outcomes


def _answer(
    pictures: list[Image.Image],
    files: list[bytes],
    links: list[str | UploadFailure],
    request: Request,
    job_id: str,
    how: dict[str, Any],
    warnings: list[str],
    wrapping_bytes: int,
    *,
    maps: Sequence[bytes],
    nsfw: Sequence[bool] | None,
) -> dict[str, Any]:
    """Links, and what has none in the answer itself, as long as it fits.

    Args:
        warnings: what there is to tell beside what becomes of the files.
        wrapping_bytes: how much is put around the answer.
        maps: as `told_beside`, and so is `nsfw`.

    Raises:
        RequestError: it does not.
    """
    images = {i: link for i, link in enumerate(links) if isinstance(link, str)}
    inline = [i for i in range(len(files)) if i not in images]
    cause = next((link.cause for link in links if isinstance(link, UploadFailure)), "")
    if cause:
        warnings = [*warnings, f"{len(inline)} of {len(files)} pictures not uploaded: {cause}"]
    told = told_beside(maps, nsfw)
    maps_bytes = len(json.dumps(told))
    if inline:
        beside: dict[str, Any] = {"images": list(images.values()), "warning": warnings, **told}
        if 0 in images:  # the first picture is not there twice, but its link is
            beside["image_url"] = images[0]
            request = request.model_copy(update={"duplicate_first": False})
        try:
            fitted = fit(
                [pictures[i] for i in inline],
                [files[i] for i in inline],
                request,
                job_id,
                numbers=inline,
                beside_bytes=len(json.dumps(beside)) + wrapping_bytes,
                **how,
            )
        except RequestError as error:
            uploaded = "".join(f"; stored: {without_secrets(link)}" for link in images.values())
            of_maps = f"; return_maps false, by {maps_bytes / 1e6:.1f} MB" if maps else ""
            raise RequestError(
                f"{cause and f'not uploaded: {cause}; '}{error}{of_maps}{uploaded}"
            ) from None
        images |= {
            i: data_uri(file, fitted.output_format)
            for i, file in zip(inline, fitted.files, strict=True)
        }
        warnings = [*warnings, *([fitted.warning] if fitted.warning else [])]
    elif maps and not fits_beside_links(maps_bytes, job_id):
        told = told_beside((), nsfw)
        warnings = [
            *warnings,
            f"maps: {maps_bytes / 1e6:.1f} MB, which the platform would not take: left out",
        ]
    in_order = [images[i] for i in range(len(files))]
    return build_output(in_order, request, warning="; ".join(warnings) or None, beside=told)


async def _canvas(
    request: Request, native_size_px: int, job_id: str, *, takes_holes: bool
) -> Canvas:
    """What is drawn on: the picture of `image_url` and its mask.

    Args:
        takes_holes: what is transparent in the picture is its mask, if anything is.

    Raises:
        RequestError: one of them cannot be had, or they do not go together.
    """
    with timed("fetch", job_id):
        fields = ("image_url", "mask_url")
        given = {name: getattr(request, name) for name in fields}
        contents = await _fetch_side_by_side(
            {name: address for name, address in given.items() if address is not None}
        )
    # Without a mode, image_url keeps its size whatever the other fields say, as in 2.1.0.
    sides = (request.height, request.width) if request.mode else (None, None)
    has_mask_file = request.mask_url is not None
    with timed("decode", job_id):
        decoded = await decode_apart(
            contents["image_url"],
            "image_url",
            height_px=sides[0],
            width_px=sides[1],
            how=request.fit,
            masked=request.is_masked,
            mask_from_alpha="if_any"
            if takes_holes
            else request.mask_from_alpha and not has_mask_file,
            mask_invert=request.mask_invert,
        )
        picture, mask = decoded.picture, decoded.mask
        if has_mask_file:
            mask = await decode_mask_apart(
                contents["mask_url"],
                "mask_url",
                decoded.fit,
                from_alpha=request.mask_from_alpha,
                mask_invert=request.mask_invert,
            )
        elif mask is not None and not request.mask_invert:
            # What is transparent has no colour, and white would shine through what is drawn.
            picture = await in_thread(with_holes_filled, picture, mask)
        return await in_thread(
            prepare_canvas,
            picture,
            mask,
            mask_blur=request.mask_blur,
            mask_padding=request.mask_padding,
            native_size_px=native_size_px,
            max_side_px=MAX_SIDE_PX if any(sides) else MAX_AUTOMATIC_SIDE_PX,
        )


async def _references(
    request: Request,
    stages: "Sequence[Stage]",
    canvas: Canvas | None,
    beside: "Beside",
    job_id: str,
) -> References:
    """The pictures of `controlnet` and `ip_adapter`: maps as far as the CPU makes them.

    Raises:
        RequestError: one of them cannot be had, or does not become what it should.
    """
    addresses = addresses_of(request)
    if not addresses:
        return NO_REFERENCES
    from sdxl_worker.drawing.stages import drawn_sizes_px

    size = canvas.picture.size if canvas is not None else drawn_sizes_px(stages, None)[0]
    async with not_holding_the_end("the pictures of controlnet and ip_adapter"):
        decoded: dict[str, Any] = {}
        for some in _in_parts(addresses, FILES_AT_ONCE):
            with timed("fetch", job_id):
                contents = await _fetch_side_by_side(some)
            with timed("decode", job_id):
                decoded |= await decode_references(request, contents, size)
            del contents  # before the next are fetched
        references = references_of(request, decoded)
        with timed("decode", job_id):
            return await in_thread(prepare_references, references, request, canvas, beside.pose)


def _in_parts(addresses: Mapping[str, str], at_most: int) -> list[dict[str, str]]:
    """Of no more different addresses each."""
    different = list(dict.fromkeys(addresses.values()))
    return [
        {field: one for field, one in addresses.items() if one in different[i : i + at_most]}
        for i in range(0, len(different), at_most)
    ]


async def _fetch_side_by_side(addresses: Mapping[str, str]) -> dict[str, bytes]:
    """What is at the addresses, by field. What several fields name is fetched once."""
    fields: dict[str, str] = {}
    for field, address in addresses.items():
        fields.setdefault(address, field)
    fetching = [asyncio.ensure_future(fetch(address, fields[address])) for address in fields]
    try:
        found = dict(zip(fields, await asyncio.gather(*fetching), strict=True))
        return {field: found[address] for field, address in addresses.items()}
    finally:
        for one in fetching:
            one.cancel()


@dataclass(frozen=True)
class _Drawn:
    pictures: list[Image.Image]
    canvas: Canvas | None
    """What they are put back into."""
    ms: float
    """What they took."""
    lost: float
    """The share of what LoRAs change that rounding lost."""
    maps: Sequence[Image.Image]
    """Of `controlnet`."""


def _draw(
    job_id: str,
    queued_at: float,
    models: "Models",
    settings: Settings,
    progress: Progress,
    request: Request,
    stages: "Sequence[Stage]",
    canvas: Canvas | None,
    beside: "Beside",
    references: References,
    **options: Any,
) -> _Drawn:
    """On the GPU thread."""
    from sdxl_worker.adapters.patching import patches_of
    from sdxl_worker.drawing.generate import generate
    from sdxl_worker.serving.beside import steering_of, with_depth_maps

    models = put_on_card(models, settings, progress.on_loading)
    reset_peak_memory()
    references = with_depth_maps(request, beside, references, models, progress.on_loading)
    steering = steering_of(request, beside, references, models, progress.on_loading, progress.check)
    with timed("generate", job_id, queued_at=queued_at) as timing:
        if request.hires is not None and canvas is not None and steering.enlarge is not None:
            canvas = canvas.with_larger(request.hires.scale, steering.enlarge)
        pictures = generate(
            request,
            stages,
            models,
            canvas,
            progress.on_step,
            check=progress.check,
            steering=steering,
            **options,
        )
    return _Drawn(pictures, canvas, timing.ms, patches_of(models).lost, references.controls)
