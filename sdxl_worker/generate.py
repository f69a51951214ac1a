"""Pictures: a function of the request, the models and the input picture, and of nothing else."""

from enum import Enum
from typing import Any

import torch
from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.models import Models
from sdxl_worker.prompts import Encoding, encode_pair
from sdxl_worker.request import Request
from sdxl_worker.schedulers import build_scheduler


class Path(Enum):
    """Which networks make the picture, in which order."""

    BASE = "the base alone"
    BASE_THEN_REFINER = "the base to the end, then some noise and the refiner"
    ENSEMBLE = "the base for the first part of one schedule, the refiner for the rest"
    REFINER = "the refiner alone, on the input picture"
    UNCHANGED = "the input picture, refined in no step"


def choose_path(request: Request, models: Models) -> Path:
    """Decide before any work which path the request takes.

    Raises:
        RequestError: the request asks for the refiner and the worker has none.
    """
    if request.image_url is not None:
        path = Path.REFINER if request.refiner_steps_run else Path.UNCHANGED
    elif request.refiner_inference_steps == 0:
        path = Path.BASE
    elif request.high_noise_frac is not None:
        path = Path.ENSEMBLE
    else:
        path = Path.BASE_THEN_REFINER if request.refiner_steps_run else Path.BASE

    if models.refiner is not None or path in (Path.BASE, Path.UNCHANGED):
        return path
    # The refiner's share is a default: only who asks for it by name is told that there is none.
    asked = request.model_fields_set & {"image_url", "high_noise_frac", "refiner_inference_steps"}
    if asked:
        raise RequestError(
            f"{', '.join(sorted(asked))}: needs the refiner, and this worker has none; leave it "
            "out, or serve a MODEL_DIR with a refiner/ folder"
        )
    return Path.BASE


@torch.no_grad()
def generate(
    request: Request, models: Models, input_picture: Image.Image | None = None
) -> list[Image.Image]:
    """Make `request.num_images` RGB pictures.

    Args:
        input_picture: what `image_url` led to, RGB and in the size to refine.

    Raises:
        RequestError: as `choose_path`.
    """
    path = choose_path(request, models)
    if path is Path.UNCHANGED:
        assert input_picture is not None
        return [input_picture] * request.num_images

    # Each picture has a generator of its own, on the CPU: picture i is what a request with
    # seed + i for one picture gives, on any device. The refiner goes on where the base stopped:
    # from a fresh generator it would add the very noise that the base began with.
    generators = [
        torch.Generator("cpu").manual_seed(request.seed + i) for i in range(request.num_images)
    ]
    prompt, negative_prompt = encode_pair(request.prompt, request.negative_prompt, models)

    def run_base(**options: Any) -> Any:
        return _run(
            models.base,
            request,
            models,
            generators,
            _embeddings_for_base(prompt, negative_prompt, request, models),
            height=request.height or models.native_size_px,
            width=request.width or models.native_size_px,
            num_inference_steps=request.num_inference_steps,
            **options,
        )

    def run_refiner(image: Any, **options: Any) -> Any:
        return _run(
            models.refiner,
            request,
            models,
            generators,
            _embeddings_for_refiner(prompt, negative_prompt),
            image=image,
            **options,
        )

    by_strength = {
        "num_inference_steps": request.refiner_inference_steps,
        "strength": request.strength,
    }
    match path:
        case Path.BASE:
            return run_base()
        case Path.BASE_THEN_REFINER:
            return run_refiner(run_base(output_type="latent"), **by_strength)
        case Path.REFINER:
            return run_refiner(input_picture, **by_strength)
        case Path.ENSEMBLE:
            # One schedule, cut at one place: same steps, same scheduler, nothing added between.
            latents = run_base(denoising_end=request.high_noise_frac, output_type="latent")
            return run_refiner(
                latents,
                num_inference_steps=request.num_inference_steps,
                denoising_start=request.high_noise_frac,
            )


def _run(
    pipeline: Any,
    request: Request,
    models: Models,
    generators: list[torch.Generator],
    embeddings: dict[str, torch.Tensor],
    **options: Any,
) -> Any:
    """One stage, with what every stage takes from the request and a scheduler of its own."""
    pipeline.scheduler = build_scheduler(request.scheduler, models.scheduler_config)
    return pipeline(
        **embeddings,
        **options,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images,
        generator=generators,
    ).images


def _embeddings_for_base(
    prompt: Encoding, negative_prompt: Encoding, request: Request, models: Models
) -> dict[str, torch.Tensor]:
    """Both encoders' states side by side; zeros for an empty negative prompt.

    SDXL's base was trained with zeros for "no caption", not with the encoding of an empty one
    (`force_zeros_for_empty_prompt` in its model_index.json).
    """
    prompt_embeds = torch.cat([prompt.hidden_1, prompt.hidden_2], dim=-1)
    negative_embeds = torch.cat([negative_prompt.hidden_1, negative_prompt.hidden_2], dim=-1)
    negative_pooled = negative_prompt.pooled
    if not request.negative_prompt and models.base.config.force_zeros_for_empty_prompt:
        negative_embeds = torch.zeros_like(prompt_embeds)
        negative_pooled = torch.zeros_like(prompt.pooled)
    return {
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": prompt.pooled,
        "negative_prompt_embeds": negative_embeds,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


def _embeddings_for_refiner(prompt: Encoding, negative_prompt: Encoding) -> dict[str, torch.Tensor]:
    """The second encoder's states alone. The refiner was trained with the empty caption encoded."""
    return {
        "prompt_embeds": prompt.hidden_2,
        "pooled_prompt_embeds": prompt.pooled,
        "negative_prompt_embeds": negative_prompt.hidden_2,
        "negative_pooled_prompt_embeds": negative_prompt.pooled,
    }
