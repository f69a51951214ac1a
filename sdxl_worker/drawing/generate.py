"""Drawing pictures: the stages of a request, batch after batch."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from PIL import Image

from sdxl_worker.drawing import batches
from sdxl_worker.drawing.prompts import Encoding, encode_pair
from sdxl_worker.drawing.schedulers import build_scheduler
from sdxl_worker.drawing.stages import Stage, output_size_px, total_steps
from sdxl_worker.drawing.steps import Step, StepCounter
from sdxl_worker.errors import let_go
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request
from sdxl_worker.speed.no_waits import timesteps_on_device
from sdxl_worker.speed.step_cache import step_cache


@torch.no_grad()
def generate(
    request: Request,
    stages: Sequence[Stage],
    models: Models,
    input_picture: Image.Image | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    *,
    step_cache_interval: int | None = None,
) -> list[Image.Image]:
    """Make `request.num_images` RGB pictures.

    It uses no environment variable, Internet or disk, and leaves the networks as they were. How
    many pictures are drawn at once, and whether they are decoded in tiles, follows from the free
    memory of the GPU. Both change the rounding; tiles also change the pixels at their seams.

    Args:
        stages: as `plan_stages` returns them for the request and the models.
        input_picture: the picture of `image_url`, RGB and in the size to refine.
        on_step: called after each denoising step. If it raises, drawing ends at once.
        step_cache_interval: as `STEP_CACHE`.
    """
    if not stages:
        return [cast(Image.Image, input_picture)] * request.num_images

    size_px, steps = output_size_px(stages, input_picture), total_steps(stages)
    texts = encode_pair(request.prompt, request.negative_prompt, models)
    plan = batches.plan(models, num_images=request.num_images, pixels=math.prod(size_px))
    # Each picture has a generator of its own, on the CPU: picture i is what a request for one
    # picture with seed + i gives, within rounding, on any device. The refiner goes on with the
    # base's generator: from a fresh one it would add the same noise that the base began with.
    generators = [
        torch.Generator("cpu").manual_seed(request.seed_of(i)) for i in range(request.num_images)
    ]
    starts = range(0, request.num_images, plan.batch_size)
    counter = StepCounter(on_step, steps * len(starts), models.device)
    pictures: list[Image.Image] = []
    with _decoding_as_planned(models.vae, plan), timesteps_on_device(*models.unets()):
        for start in starts:
            batch = generators[start : start + plan.batch_size]
            images: Any = input_picture
            for stage in stages:
                pipeline = _pipeline(stage, models)
                call = {
                    **stage.options,
                    **_embeddings(*texts, pipeline, zeros_for_empty=not request.negative_prompt),
                    "guidance_scale": request.guidance_scale,
                    "num_images_per_prompt": len(batch),
                    "generator": batch,
                    "callback_on_step_end": counter.callback(stage.name),
                    "output_type": "pt" if stage is stages[-1] else "latent",
                }
                if images is not None:
                    call["image"] = images
                pipeline.scheduler = build_scheduler(
                    request.scheduler,
                    models.scheduler_config,
                    begins_in_mid_schedule=stage.begins_in_mid_schedule,
                )
                with step_cache(pipeline, step_cache_interval):
                    images = pipeline(**call).images
            pictures += _to_pictures(images)
    return pictures


def _pipeline(stage: Stage, models: Models) -> Any:
    """A pipeline over the networks of a stage. Nothing is copied, so making one is cheap."""
    if stage.name == "base":
        own: dict[str, Any] = {
            "tokenizer": models.tokenizer,
            "text_encoder": models.text_encoder,
            "unet": models.unet,
            "force_zeros_for_empty_prompt": models.zeros_for_empty_prompt,
        }
    else:
        own = {
            "tokenizer": None,
            "text_encoder": None,
            "unet": models.refiner_unet,
            "force_zeros_for_empty_prompt": models.refiner_zeros_for_empty_prompt,
            "requires_aesthetics_score": models.refiner_takes_aesthetic_score,
        }
    pipeline = stage.pipeline(
        **own,
        tokenizer_2=models.tokenizer_2,
        text_encoder_2=models.text_encoder_2,
        vae=models.vae,
        scheduler=None,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _decoding_as_planned(vae: Any, plan: batches.Plan) -> Iterator[None]:
    """Around what decodes or encodes. Afterwards the VAE is as it was, even if that fails.

    diffusers sets a VAE with `force_upcast` to float32 and, if the pass fails, leaves it so.
    """
    dtype, slicing, tiling = vae.dtype, vae.use_slicing, vae.use_tiling
    vae.use_slicing, vae.use_tiling = plan.slicing, plan.tiling
    try:
        yield
    except BaseException as error:
        let_go(error)  # or there may be no memory left to convert the VAE back
        raise
    finally:
        vae.use_slicing, vae.use_tiling = slicing, tiling
        vae.to(dtype=dtype)


def _to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Rounded to 8 bits on their device, so that only a quarter of the bytes leaves the GPU.

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
