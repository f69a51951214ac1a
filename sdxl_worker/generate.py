"""Pictures: a function of the request, the models and the input picture, and of nothing else."""

import functools
from enum import Enum
from typing import Any, cast

import torch
from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.models import Models
from sdxl_worker.prompts import Encoding, encode_pair
from sdxl_worker.request import Request
from sdxl_worker.schedulers import build_scheduler


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


@torch.no_grad()
def generate(
    request: Request, models: Models, input_picture: Image.Image | None = None
) -> list[Image.Image]:
    """Make `request.num_images` RGB pictures.

    Args:
        input_picture: what `image_url` led to, RGB and in the size to refine.

    Raises:
        RequestError: as `choose_mode`.
    """
    mode = choose_mode(request, models)
    if mode is Mode.UNCHANGED:
        return [cast(Image.Image, input_picture)] * request.num_images

    # Each picture has a generator of its own, on the CPU: picture i is what a request with
    # seed + i for one picture gives, on any device. The refiner goes on where the base stopped:
    # from a fresh generator it would add the very noise that the base began with.
    generators = [
        torch.Generator("cpu").manual_seed(request.seed + i) for i in range(request.num_images)
    ]
    texts = encode_pair(request.prompt, request.negative_prompt, models)

    def run(pipeline: Any, **options: Any) -> Any:
        """One stage, with what every stage takes from the request and a scheduler of its own."""
        pipeline.scheduler = build_scheduler(request.scheduler, models.scheduler_config)
        return pipeline(
            **_embeddings(*texts, pipeline, zeros_for_empty=not request.negative_prompt),
            **options,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.num_images,
            generator=generators,
        ).images

    run_base = functools.partial(
        run,
        models.base,
        height=request.height or models.native_size_px,
        width=request.width or models.native_size_px,
        num_inference_steps=request.num_inference_steps,
    )
    run_refiner = functools.partial(run, models.refiner)
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
