"""A picture is drawn in stages, which are planned from the request and the models before any work.

Only this module decides what a request may ask of the networks that there are, how many steps it
takes, and what size comes out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from sdxl_worker.drawing.prompts import check_clip_skip
from sdxl_worker.drawing.schedulers import build_scheduler, check_sampler, timesteps_run
from sdxl_worker.errors import RequestError
from sdxl_worker.few_step import FewStep
from sdxl_worker.field_types import MAX_SIDE_PX
from sdxl_worker.inputs.canvas import Canvas, larger_size
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request
from sdxl_worker.request_objects import HiresField


@dataclass(frozen=True)
class Stage:
    """One pipeline that runs over one schedule, or over a part of it."""

    name: Literal["base", "refiner"]
    """Whose networks it uses."""
    pipeline: type
    """A class of diffusers. All but text-to-image take the pictures of the previous stage."""
    steps: int
    """Calls of the UNet, or the steps of the request, as long as its sampler is not known: some
    call it twice in a step, or repeat one."""
    options: Mapping[str, Any]
    """Arguments of the pipeline, beside those that every stage takes from the request."""
    scale: float | None = None
    """By how much the pictures of the previous stage are enlarged before: that of `hires`. None:
    it is not the second pass."""

    @property
    def label(self) -> Literal["base", "hires", "refiner"]:
        """Its name in progress updates."""
        return "hires" if self.is_second_pass else self.name

    @property
    def is_second_pass(self) -> bool:
        """Whether it is the second pass of `hires`."""
        return self.scale is not None

    @property
    def begins_in_mid_schedule(self) -> bool:
        return "denoising_start" in self.options or self.options.get("strength", 1) < 1

    @property
    def adds_noise(self) -> bool:
        """Whether it begins with new noise, not with what an earlier stage left."""
        return "denoising_start" not in self.options


def plan_stages(request: Request, models: Models) -> tuple[Stage, ...]:
    """The stages of a request, in order. None at all: the input picture is returned as it is.

    Raises:
        RequestError: the request asks for the refiner and the worker has none, or to redraw a
            picture in no step, or for what the sampler or the model cannot do, or for too large
            pictures, as far as their size is known without `image_url`.
    """
    check_clip_skip(request, models)
    stages = _stages(request, models)
    if request.image_url is None:
        final_size_px(request, stages, None)
    # One that is not named may still be that of a few-step LoRA.
    if "scheduler" not in request.model_fields_set:
        return stages
    check_sampler(request, models.scheduler_config)
    return tuple(_counted(stage, request, models) for stage in stages)


def _counted(stage: Stage, request: Request, models: Models) -> Stage:
    """With the steps that its schedule really has."""
    scheduler = scheduler_of(stage, request, models)
    steps = timesteps_run(scheduler, stage.options)
    if not steps and "strength" in stage.options:
        raise RequestError(
            f"{_strength_of(stage)}: {stage.options['strength']:g} leaves "
            f"{'the second pass' if stage.is_second_pass else f'the {stage.name}'} no step of this "
            "schedule; raise it"
        )
    return replace(stage, steps=steps)


def _strength_of(stage: Stage) -> str:
    """The field."""
    return "hires.strength" if stage.is_second_pass else "strength"


def scheduler_of(
    stage: Stage, request: Request, models: Models, few_step: FewStep | None = None
) -> Any:
    """A new scheduler for a stage."""
    is_base = stage.name == "base"
    return build_scheduler(
        request.scheduler,
        models.scheduler_config if is_base else models.refiner_scheduler_config,
        begins_in_mid_schedule=stage.begins_in_mid_schedule,
        schedule=request.schedule,
        few_step=few_step,
        denoising_end=stage.options.get("denoising_end"),
    )


def _stages(request: Request, models: Models) -> tuple[Stage, ...]:
    refine = (_refine(request),) if request.refiner_steps_run else ()
    if request.image_url is not None and request.mode != "img2img":
        stages: tuple[Stage, ...] = refine
    else:
        cut = request.high_noise_frac or 0
        hands_over = 0 < cut < 1 and request.refiner_inference_steps > 0
        # One schedule, cut in one place: the same steps and scheduler, no noise added between.
        of_base = _of_base(request, models, until=cut if hands_over else None)
        stages = (*of_base, *((_go_on(of_base[-1], cut),) if hands_over else refine))

    if models.refiner_unet is not None or all(stage.name != "refiner" for stage in stages):
        return stages
    # The refiner is there by default: only a request that names it is refused for lack of one.
    if stages[0].name == "refiner":
        raise RequestError(
            "image_url: needs the refiner, and this model has none; let the base redraw it, with "
            'mode "img2img", or serve a MODEL_DIR with a refiner/ folder'
        )
    asked = request.model_fields_set & {"refiner_inference_steps", "refiner_strength"}
    asked |= {"high_noise_frac"} if "denoising_start" in stages[-1].options else set()
    if asked:
        raise RequestError(
            f"{', '.join(sorted(asked))}: needs the refiner, and this model has none; leave it "
            "out, or serve a MODEL_DIR with a refiner/ folder"
        )
    return _of_base(request, models, until=None)


def _of_base(request: Request, models: Models, *, until: float | None) -> tuple[Stage, ...]:
    """What the base draws.

    Args:
        until: the share of the last schedule at which it stops, if not at its end.
    """
    if request.hires is None:
        return (_base(request, models, until=until),)
    return _base(request, models, until=None), _larger(request, request.hires, until=until)


def _larger(request: Request, hires: HiresField, *, until: float | None) -> Stage:
    """The base redraws what it drew, enlarged."""
    steps = hires.steps or request.num_inference_steps
    return replace(
        _redrawing("hires.strength", hires.strength, steps, until=until), scale=hires.scale
    )


def _base(request: Request, models: Models, *, until: float | None) -> Stage:
    """The base draws, or redraws the input picture.

    Args:
        until: the share of the schedule at which it stops, if not at its end.
    """
    of_schedule = request.num_inference_steps
    if request.image_url is not None:
        return _redrawing("strength", request.strength, of_schedule, until=until)
    options: dict[str, Any] = {
        "num_inference_steps": of_schedule,
        "width": request.width or models.native_size_px,
        "height": request.height or models.native_size_px,
    }
    if until is not None:
        options["denoising_end"] = until
    steps = of_schedule if until is None else round(of_schedule * until)
    return Stage("base", StableDiffusionXLPipeline, steps, options)


def _redrawing(field: str, strength: float, of_schedule: int, *, until: float | None) -> Stage:
    """The base redraws a picture.

    Args:
        field: of the strength.
        of_schedule: steps of a strength of 1.
        until: as above.
    """
    left_out = of_schedule - (of_schedule if until is None else round(of_schedule * until))
    steps = int(of_schedule * strength) - left_out  # as diffusers counts them
    if steps < 1:
        least = _least_strength(of_schedule, left_out + 1)
        raise RequestError(
            f"{field}: {strength:g} of {of_schedule} steps"
            + (f", of which the refiner does {left_out}," if left_out else "")
            + f" leaves {'the base' if field == 'strength' else 'the second pass'} no step; "
            + (f"the smallest value that works is {least:g}" if least else "raise high_noise_frac")
        )
    options: dict[str, Any] = {"num_inference_steps": of_schedule, "strength": strength}
    if until is not None:
        options["denoising_end"] = until
    return Stage("base", StableDiffusionXLImg2ImgPipeline, steps, options)


def _least_strength(of_schedule: int, steps: int) -> float | None:
    """The smallest strength, in thousandths, that gives so many steps of a schedule."""
    thousandths = math.ceil(1000 * steps / of_schedule)
    while int(of_schedule * (thousandths / 1000)) < steps:
        thousandths += 1
    return thousandths / 1000 if thousandths <= 1000 else None


def _go_on(base: Stage, start: float) -> Stage:
    """The refiner goes on with latents that the base left with noise in them."""
    steps = base.options["num_inference_steps"]
    options = {"num_inference_steps": steps, "denoising_start": start}
    return Stage("refiner", StableDiffusionXLImg2ImgPipeline, steps - round(steps * start), options)


def _refine(request: Request) -> Stage:
    """The refiner adds noise to a finished picture, and removes it again."""
    redraws = request.mode == "img2img"
    options = {
        "num_inference_steps": request.refiner_inference_steps,
        "strength": request.refiner_strength if redraws else request.strength,
    }
    return Stage("refiner", StableDiffusionXLImg2ImgPipeline, request.refiner_steps_run, options)


def as_drawn(request: Request, stages: Sequence[Stage]) -> Request:
    """A request that gives these stages on any worker, also on one with a refiner.

    Without a refiner the base draws alone, though by default a request asks for both.
    """
    if stages and all(stage.name == "base" for stage in stages):
        return request.model_copy(update={"refiner_inference_steps": 0})
    return request


def total_steps(stages: Sequence[Stage]) -> int:
    return sum(stage.steps for stage in stages)


def drawn_sizes_px(stages: Sequence[Stage], canvas: Canvas | None) -> list[tuple[int, int]]:
    """Width and height as the networks see them: first, and in the second pass of `hires`."""
    scales = _scales(stages)
    if canvas is not None:
        first = canvas.working.size
        return [first, *(canvas.larger_sizes(scale)[1] for scale in scales)]
    first = stages[0].options["width"], stages[0].options["height"]
    return [first, *(larger_size(first, scale) for scale in scales)]


def output_size_px(stages: Sequence[Stage], canvas: Canvas | None) -> tuple[int, int]:
    """Width and height of the pictures that are drawn, before they are enlarged by `upscale`."""
    if canvas is None:
        return drawn_sizes_px(stages, None)[-1]
    sizes = [canvas.larger_sizes(scale)[0] for scale in _scales(stages)]
    return sizes[0] if sizes else canvas.picture.size


def _scales(stages: Sequence[Stage]) -> list[float]:
    """Of the second pass, if there is one."""
    return [stage.scale for stage in stages if stage.scale is not None]


def upscaled_size_px(size_px: tuple[int, int], factor: float) -> tuple[int, int]:
    """Width and height after `upscale`."""
    return round(size_px[0] * factor), round(size_px[1] * factor)


def final_size_px(
    request: Request, stages: Sequence[Stage], canvas: Canvas | None
) -> tuple[int, int]:
    """Width and height of the pictures that come out.

    Raises:
        RequestError: `hires` or `upscale` would make them too large.
    """
    size_px = output_size_px(stages, canvas)
    if request.hires is not None:
        before = output_size_px(stages[:1], canvas)
        _check_size("hires.scale", before, size_px)
        # Of a canvas with a mask, what is drawn may be larger than what comes out.
        drawn = drawn_sizes_px(stages, canvas)
        _check_size("hires.scale", drawn[0], drawn[-1])
    if request.upscale is None:
        return size_px
    upscaled = upscaled_size_px(size_px, request.upscale.factor)
    _check_size("upscale.factor", size_px, upscaled)
    return upscaled


def _check_size(field: str, size_px: tuple[int, int], larger_px: tuple[int, int]) -> None:
    if max(larger_px) <= MAX_SIDE_PX:
        return
    largest = math.floor(100 * MAX_SIDE_PX / max(size_px)) / 100
    raise RequestError(
        f"{field}: {size_px[0]} x {size_px[1]} would become {larger_px[0]} x {larger_px[1]}, and "
        f"no side may be over {MAX_SIDE_PX}; "
        + (f"{largest:g} is the most that works" if largest > 1 else "leave it out")
    )
