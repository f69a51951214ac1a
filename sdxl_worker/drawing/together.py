"""Which requests may be drawn side by side: the one rule."""

from collections.abc import Hashable, Sequence

from sdxl_worker.adapters.of_request import Adapters
from sdxl_worker.adapters.patching import key_of
from sdxl_worker.drawing.stages import Stage, drawn_sizes_px
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request
from sdxl_worker.settings import Settings


def kind_of(
    request: Request,
    stages: Sequence[Stage],
    models: Models,
    canvas: Canvas | None,
    adapters: Adapters,
    settings: Settings,
) -> Hashable | None:
    """Requests of one kind may be drawn side by side; None: this one is drawn alone.

    They need the same weights, LoRAs included, and the same sizes: passes over pictures of others
    cannot be one, and done in turn each picture would only come later. Stages, sampler,
    steps, guidance, prompts and the number of pictures are each one's own.

    Alone is drawn where a UNet's blocks keep something from step to step (`STEP_CACHE`), where
    pictures of one pass depend on each other (fp8 has one scale for all rows), where networks take
    turns on the GPU, what reports on the worker, what control pictures or pictures as prompts steer
    (passes of others have not what those add), and `hires`, whose passes differ in size.

    Args:
        stages: of the request, as for the other arguments.
    """
    if settings.batch_jobs == 1 or request.check:
        return None
    if settings.step_cache is not None or settings.quantize == "fp8":
        return None
    if request.controlnet or request.ip_adapter or request.hires:
        return None
    if not stages or not models.placement.resident:
        return None
    return models.model_dir.root, key_of(adapters.loras), *drawn_sizes_px(stages, canvas)
