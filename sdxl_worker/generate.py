"""Pictures: a function of the request, the models and the input picture, and of nothing else."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from PIL import Image

from sdxl_worker import memory
from sdxl_worker.errors import RequestError
from sdxl_worker.gpu import StepsAhead
from sdxl_worker.models import Models
from sdxl_worker.prompts import Encoding, encode_pair
from sdxl_worker.request import Request
from sdxl_worker.schedulers import build_scheduler
from sdxl_worker.step_cache import step_cache


class Mode(Enum):
    """Which networks make the picture, in which order."""

    BASE = "the base alone"
    BASE_THEN_REFINER = "the base to the end, then some noise and the refiner"
    ENSEMBLE = "the base for the first part of one schedule, the refiner for the rest"
    REFINER = "the refiner alone, on the input picture"
    UNCHANGED = "the input picture, refined in no step"


def choose_mode(request: Request, models: Models) -> Mode:
    """Decide before any work which mode the request takes.

    Raises:
        RequestError: the request asks for the refiner and the worker has none.
    """
    if request.image_url is not None:
        mode = Mode.REFINER if request.refiner_steps_run else Mode.UNCHANGED
    elif request.refiner_inference_steps == 0:
        mode = Mode.BASE
    elif request.high_noise_frac is not None:
        mode = Mode.ENSEMBLE
    else:
        mode = Mode.BASE_THEN_REFINER if request.refiner_steps_run else Mode.BASE

    if models.refiner is not None or mode in (Mode.BASE, Mode.UNCHANGED):
        return mode
    # The refiner's share is a default: only who asks for it by name is told that there is none.
    asked = request.model_fields_set & {"image_url", "high_noise_frac", "refiner_inference_steps"}
    if asked:
        raise RequestError(
            f"{', '.join(sorted(asked))}: needs the refiner, and this worker has none; leave it "
            "out, or serve a MODEL_DIR with a refiner/ folder"
        )
    return Mode.BASE


@dataclass(frozen=True)
class Step:
    """One denoising step that is done."""

    stage: str
    """"base" or "refiner"."""
    step: int
    steps: int
    """Of this stage."""
    percent: int
    """Of all steps of the request."""
    latents: Callable[[], torch.Tensor]
    """The pictures so far at unit scale, [num_images, 4, height / 8, width / 8]."""


def planned_steps(request: Request, mode: Mode) -> int:
    """Denoising steps of the whole request, give or take one for schedulers that repeat a step."""
    match mode:
        case Mode.UNCHANGED:
            return 0
        case Mode.REFINER:
            return request.refiner_steps_run
        case Mode.BASE_THEN_REFINER:
            return request.num_inference_steps + request.refiner_steps_run
        case Mode.BASE | Mode.ENSEMBLE:
            return request.num_inference_steps


def picture_size_px(
    request: Request, models: Models, input_picture: Image.Image | None
) -> tuple[int, int]:
    """Width and height of what `generate` makes of the same arguments."""
    if input_picture is not None:
        return input_picture.size
    native = models.native_size_px
    return request.width or native, request.height or native


@torch.no_grad()
def generate(
    request: Request,
    models: Models,
    input_picture: Image.Image | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> list[Image.Image]:
    """Make `request.num_images` RGB pictures.

    Args:
        input_picture: what `image_url` led to, RGB and in the size to refine.
        on_step: called after each denoising step. What it raises ends the work there and then.

    Raises:
        RequestError: as `choose_mode`.
    """
    mode = choose_mode(request, models)
    if mode is Mode.UNCHANGED:
        return [cast(Image.Image, input_picture)] * request.num_images

    size_px = picture_size_px(request, models, input_picture)
    texts = encode_pair(request.prompt, request.negative_prompt, models)
    vae = models.base.vae
    plan = memory.plan(
        models.device,
        models.dtype,
        num_images=request.num_images,
        pixels=math.prod(size_px),
        decoder_dtype=torch.float32 if _decodes_in_float32(vae) else models.dtype,
        moved_in_bytes=0 if models.placement.resident else _largest_unet_bytes(models),
    )
    vae.use_slicing, vae.use_tiling = plan.slicing, plan.tiling

    # Each picture has a generator of its own, on the CPU: picture i is what a request with
    # seed + i for one picture gives, on any device. The refiner goes on where the base stopped:
    # from a fresh generator it would add the very noise that the base began with.
    generators = [
        torch.Generator("cpu").manual_seed(request.seed + i) for i in range(request.num_images)
    ]
    starts = range(0, request.num_images, plan.batch_size)
    steps = _Steps(on_step, planned_steps(request, mode) * len(starts), models.device)
    pictures: list[Image.Image] = []
    for start in starts:
        batch = generators[start : start + plan.batch_size]
        run = functools.partial(_run, request, models, texts, batch, steps)
        pictures += _to_pictures(_run_mode(mode, run, request, models, size_px, input_picture))
    return pictures


def _run_mode(
    mode: Mode,
    run: Callable[..., torch.Tensor],
    request: Request,
    models: Models,
    size_px: tuple[int, int],
    input_picture: Image.Image | None,
) -> torch.Tensor:
    """The stages of one batch: RGB from 0 to 1, [n, 3, height, width]."""
    run_base = functools.partial(
        run,
        "base",
        models.base,
        width=size_px[0],
        height=size_px[1],
        num_inference_steps=request.num_inference_steps,
    )
    run_refiner = functools.partial(run, "refiner", models.refiner)
    refine_by_strength = functools.partial(
        run_refiner, num_inference_steps=request.refiner_inference_steps, strength=request.strength
    )
    match mode:
        case Mode.BASE:
            return run_base()
        case Mode.BASE_THEN_REFINER:
            return refine_by_strength(image=run_base(output_type="latent"))
        case Mode.REFINER:
            return refine_by_strength(image=input_picture)
        case Mode.ENSEMBLE:
            # One schedule, cut in one place: the same steps and scheduler, no noise added between.
            return run_refiner(
                image=run_base(denoising_end=request.high_noise_frac, output_type="latent"),
                num_inference_steps=request.num_inference_steps,
                denoising_start=request.high_noise_frac,
            )
    raise ValueError(f"no network draws in mode {mode}")


def _run(
    request: Request,
    models: Models,
    texts: tuple[Encoding, Encoding],
    generators: list[torch.Generator],
    steps: "_Steps",
    stage: str,
    pipeline: Any,
    **options: Any,
) -> torch.Tensor:
    """One stage, with what every stage takes from the request and a scheduler of its own."""
    pipeline.scheduler = build_scheduler(request.scheduler, models.scheduler_config)
    # Offloading is a chain of hooks, and what the pipelines share is in that of the last one only:
    # without its own, a UNet would stay on the GPU beside the decoder.
    pipeline.maybe_free_model_hooks()
    with step_cache(pipeline, models.step_cache):
        return pipeline(
            **_embeddings(*texts, pipeline, zeros_for_empty=not request.negative_prompt),
            **{"output_type": "pt", **options},
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=len(generators),
            generator=generators,
            callback_on_step_end=functools.partial(steps.after_step, stage),
        ).images


def _decodes_in_float32(vae: Any) -> bool:
    """As the pipelines decide it: only float16 has too small a range for some decoders."""
    return vae.config.force_upcast and vae.dtype == torch.float16


def _largest_unet_bytes(models: Models) -> int:
    pipelines = [models.base, models.refiner] if models.refiner else [models.base]
    return max(pipeline.unet.get_memory_footprint() for pipeline in pipelines)


class _Steps:
    """Counts the denoising steps of a request and reports each."""

    def __init__(self, on_step: Callable[[Step], None], planned: int, device: torch.device) -> None:
        self._on_step = on_step
        self._planned = planned
        self._done = 0
        self._steps_ahead = StepsAhead(device)

    def after_step(
        self, stage: str, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """What the pipelines call between steps."""
        self._steps_ahead.limit()
        self._done += 1
        percent = min(100 * self._done // self._planned, 100)
        # Between steps, the scheduler's input scaling is that of the step to come.
        scale = pipeline.scheduler.scale_model_input
        latents = functools.partial(scale, tensors["latents"], timestep)
        self._on_step(Step(stage, index + 1, pipeline.num_timesteps, percent, latents))
        return {}


def _to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Rounded to 8 bits where they are, so that a quarter of the bytes leaves the GPU.

    Args:
        images: RGB from 0 to 1, [n, 3, height, width].
    """
    pixels = images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(array) for array in pixels.contiguous().cpu().numpy()]


def _embeddings(
    prompt: Encoding, negative_prompt: Encoding, pipeline: Any, *, zeros_for_empty: bool
) -> dict[str, torch.Tensor]:
    """The texts as a pipeline's UNet was trained to see them.

    The base takes both encoders' states side by side, the refiner those of the second alone. "No
    caption" was zeros when SDXL's base was trained, and the encoding of an empty caption for its
    refiner: `force_zeros_for_empty_prompt` in their model_index.json.
    """

    def hidden(text: Encoding) -> torch.Tensor:
        if pipeline.text_encoder is None:
            return text.hidden_2
        return torch.cat([text.hidden_1, text.hidden_2], dim=-1)

    negative_embeds, negative_pooled = hidden(negative_prompt), negative_prompt.pooled
    if zeros_for_empty and pipeline.config.force_zeros_for_empty_prompt:
        negative_embeds = torch.zeros_like(negative_embeds)
        negative_pooled = torch.zeros_like(negative_pooled)
    return {
        "prompt_embeds": hidden(prompt),
        "pooled_prompt_embeds": prompt.pooled,
        "negative_prompt_embeds": negative_embeds,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
