"""A job before its turn: what it takes is found, fetched and read, or the job is refused."""

from collections.abc import Mapping
from dataclasses import dataclass

from sdxl_worker.adapters.of_request import Adapters, read_adapters
from sdxl_worker.drawing.control import warnings_of_controls
from sdxl_worker.drawing.guidance import warnings_of_guidance
from sdxl_worker.drawing.prompts import Texts, warnings_of
from sdxl_worker.drawing.stages import (
    Stage,
    as_drawn,
    drawn_sizes_px,
    final_size_px,
    plan_stages,
)
from sdxl_worker.few_step import warnings_of_settings, with_settings_of
from sdxl_worker.field_types import OutputFormat
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.inputs.references import References
from sdxl_worker.loading.models import Models
from sdxl_worker.openai_images import ImagesCall
from sdxl_worker.outputs.size_guard import check_expected_size
from sdxl_worker.request import Request
from sdxl_worker.serving.beside import Beside, find_beside
from sdxl_worker.serving.fetching import fetch_adapter_files, fetch_canvas, fetch_references
from sdxl_worker.serving.progress import Progress
from sdxl_worker.serving.threads import in_thread
from sdxl_worker.settings import Settings


@dataclass(frozen=True)
class Prepared:
    """All that a drawing takes beside the models."""

    request: Request
    """As `as_drawn` returns it."""
    stages: tuple[Stage, ...]
    canvas: Canvas | None
    """The picture of `image_url` and its mask."""
    beside: Beside
    references: References
    adapters: Adapters
    adapter_files: Mapping[str, AdapterFile]
    """By the place of their path in the request."""
    output_format: OutputFormat
    warnings: tuple[str, ...]
    """What the caller may not expect of it, in words."""


async def prepare(
    request: Request,
    settings: Settings,
    models: Models,
    progress: Progress,
    call: ImagesCall | None,
    job_id: str,
    *,
    is_stored: bool,
) -> Prepared:
    """
    Args:
        is_stored: the pictures become links, so that the answer has no size to be held to.

    Raises:
        RequestError: something cannot be had, does not go together, or would be too large.
    """
    plan_stages(request, models)  # refuses before anything is fetched
    # It reads folders and headers of files, which may be on a network volume.
    beside = await in_thread(find_beside, request, settings, models)
    adapter_files = await fetch_adapter_files(request, settings, progress, job_id)
    adapters = await in_thread(read_adapters, request, adapter_files, models)
    request = with_settings_of(request, adapters.few_step, models.scheduler_config)
    if call is not None:
        request = call.with_quality(request, settings)
    stages = plan_stages(request, models)
    request = as_drawn(request, stages)
    canvas = None
    if request.image_url is not None:
        takes_holes = call is not None and call.takes_holes
        canvas = await fetch_canvas(request, models.native_size_px, job_id, takes_holes=takes_holes)
        if canvas.mask is not None and not request.is_masked:
            request = request.model_copy(update={"mask_from_alpha": True})
    output_format = request.output_format or settings.default_output_format
    width, height = final_size_px(request, stages, canvas)
    if not request.check and not is_stored:
        count = len(request.controlnet or ()) if request.return_maps else 0
        drawn_width, drawn_height = drawn_sizes_px(stages, canvas)[0]
        check_expected_size(
            request,
            width * height,
            output_format,
            job_id,
            map_pixels=count * drawn_width * drawn_height,
        )
    references = await fetch_references(request, stages, canvas, beside, job_id)
    return Prepared(
        request,
        stages,
        canvas,
        beside,
        references,
        adapters,
        adapter_files,
        output_format,
        warnings=(
            *warnings_of_settings(request, adapters.few_step),
            *warnings_of(Texts.of(request), adapters.embeddings),
            *warnings_of_guidance(request, stages),
            *warnings_of_controls(request, stages),
            *(call.warnings if call is not None else ()),
        ),
    )
