"""A picture is drawn in stages, which are planned from the request and the models before any work.

Only this module decides what a request may ask of the networks that there are, how many steps it
takes, and what size comes out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request


@dataclass(frozen=True)
class Stage:
    """One pipeline that runs over one schedule, or over a part of it."""

    name: Literal["base", "refiner"]
    """Whose networks it uses; also its name in progress updates."""
    pipeline: type
    """A class of diffusers. All but text-to-image take the pictures of the previous stage."""
    steps: int
    """Denoising steps, give or take one for schedulers that repeat a step."""
    options: Mapping[str, Any]
    """Arguments of the pipeline, beside those that every stage takes from the request."""

    @property
    def begins_in_mid_schedule(self) -> bool:
        return "denoising_start" in self.options or self.options.get("strength", 1) < 1


def plan_stages(request: Request, models: Models) -> tuple[Stage, ...]:
    """The stages of a request, in order. None at all: the input picture is returned as it is.

    Raises:
        RequestError: the request asks for the refiner and the worker has none.
    """
    steps, refiner_steps = request.num_inference_steps, request.refiner_steps_run
    if request.image_url is not None:
        stages: tuple[Stage, ...] = (_refine(request),) if refiner_steps else ()
    elif request.refiner_inference_steps == 0:
        stages = (_draw(request, models, steps),)
    elif request.high_noise_frac is not None:
        # One schedule, cut in one place: the same steps and scheduler, no noise added between.
        cut = request.high_noise_frac
        of_base = round(steps * cut)
        shared = {"num_inference_steps": steps, "denoising_start": cut}
        stages = (
            _draw(request, models, of_base, denoising_end=cut),
            Stage("refiner", StableDiffusionXLImg2ImgPipeline, steps - of_base, shared),
        )
    else:
        base = _draw(request, models, steps)
        stages = (base, _refine(request)) if refiner_steps else (base,)

    if models.refiner_unet is not None or all(stage.name != "refiner" for stage in stages):
        return stages
    # The refiner is there by default: only a request that names it is refused for lack of one.
    asked = request.model_fields_set & {"image_url", "high_noise_frac", "refiner_inference_steps"}
    if asked:
        raise RequestError(
            f"{', '.join(sorted(asked))}: needs the refiner, and this worker has none; leave it "
            "out, or serve a MODEL_DIR with a refiner/ folder"
        )
    return (_draw(request, models, steps),)


def _draw(request: Request, models: Models, steps: int, **options: Any) -> Stage:
    """The base makes latents of the requested size, or of the native one."""
    options |= {
        "width": request.width or models.native_size_px,
        "height": request.height or models.native_size_px,
        "num_inference_steps": request.num_inference_steps,
    }
    return Stage("base", StableDiffusionXLPipeline, steps, options)


def _refine(request: Request) -> Stage:
    """The refiner adds noise to a finished picture, and removes it again."""
    options = {
        "num_inference_steps": request.refiner_inference_steps,
        "strength": request.strength,
    }
    return Stage("refiner", StableDiffusionXLImg2ImgPipeline, request.refiner_steps_run, options)


def as_drawn(request: Request, stages: Sequence[Stage]) -> Request:
    """A request that gives these stages on any worker, also on one with a refiner.

    Without a refiner the base draws alone, though by default a request asks for both.
    """
    if request.image_url is None and all(stage.name == "base" for stage in stages):
        return request.model_copy(update={"refiner_inference_steps": 0})
    return request


def total_steps(stages: Sequence[Stage]) -> int:
    return sum(stage.steps for stage in stages)


def output_size_px(stages: Sequence[Stage], input_picture: Image.Image | None) -> tuple[int, int]:
    """Width and height of the pictures that come out."""
    if input_picture is not None:
        return input_picture.size
    return stages[0].options["width"], stages[0].options["height"]
