"""Drawing pictures: the stages of a request, batch after batch."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from sdxl_worker.adapters.embeddings import TextualInversion
from sdxl_worker.adapters.of_request import NO_ADAPTERS, Adapters
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.drawing import batches, second_tries
from sdxl_worker.drawing.control import controlled
from sdxl_worker.drawing.decoding import decode, decoding_as_planned
from sdxl_worker.drawing.encoding import (
    EncodedCanvas,
    encode_canvas,
    encode_picture,
    latents_of,
)
from sdxl_worker.drawing.enlarging import enlarger
from sdxl_worker.drawing.guidance import guided_until
from sdxl_worker.drawing.image_prompts import with_image_prompts
from sdxl_worker.drawing.inpainting import Keeper, seeing, takes_mask
from sdxl_worker.drawing.prompts import Encoding, Texts, encode_pair
from sdxl_worker.drawing.stages import (
    Stage,
    drawn_sizes_px,
    scheduler_of,
    total_steps,
)
from sdxl_worker.drawing.steering import NO_STEERING, Steering
from sdxl_worker.drawing.steps import Step, StepCounter
from sdxl_worker.errors import PictureError, let_go
from sdxl_worker.few_step import FewStep
from sdxl_worker.gpu import free_memory, is_out_of_memory
from sdxl_worker.inputs.canvas import Canvas, Enlarge
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request
from sdxl_worker.speed.cuda_graphs import forget_recordings
from sdxl_worker.speed.direct_attention import text_keys_kept
from sdxl_worker.speed.no_waits import host_noise, timesteps_on_device
from sdxl_worker.speed.shared_passes import SharedUnet
from sdxl_worker.speed.steered import compiled_where_it_can_be, left_out
from sdxl_worker.speed.step_cache import step_cache

log = logging.getLogger(__name__)

T = TypeVar("T")

# A picture whose brightest value is below this may well become one without any light.
DARK = 32


@torch.no_grad()
def generate(
    request: Request,
    stages: Sequence[Stage],
    models: Models,
    canvas: Canvas | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    *,
    check: Callable[[], None] = lambda: None,
    adapters: Adapters = NO_ADAPTERS,
    steering: Steering = NO_STEERING,
    step_cache_interval: int | None = None,
    shares_passes: bool = False,
) -> list[Image.Image]:
    """Make `request.num_images` RGB pictures.

    It uses no environment variable or Internet, and leaves the networks as they were, but for
    LoRAs: they stay until a call for others, because the next one is often for the same. How
    many pictures are drawn at once, and whether they are decoded in tiles, follows from the free
    memory of the GPU. Both change the rounding; tiles also change the pixels at their seams.

    Args:
        stages: as `plan_stages` returns them for the request and the models.
        canvas: of the picture of `image_url`. The pictures come in the size of its `working`, or
            in that of its larger one, which it needs for `request.hires`.
        on_step: called after each denoising step. If it raises, drawing ends at once.
        check: called often while LoRAs are put on, which may take seconds. If it raises, so does
            this, at once.
        adapters: what `request.loras` and `request.embeddings` name.
        steering: what `request.controlnet`, `request.ip_adapter` and `request.hires` ask for.
        step_cache_interval: as `STEP_CACHE`.
        shares_passes: whether this is called in a drawing of `draw_side_by_side`.

    Raises:
        RequestError: the size is too large for the GPU, for certain.
        PictureError: what came out is no picture, and was none the second time.
        torch.OutOfMemoryError: one picture, decoded in tiles, does not fit.
    """
    count = request.num_images
    if not stages:
        return [cast(Canvas, canvas).working] * count

    sizes_px = drawn_sizes_px(stages, canvas)
    width, height = sizes_px[-1]  # the largest
    beside: dict[str, Any] = {
        "controls": steering.controls,
        "image_prompts": steering.image_prompts,
    }
    batches.check_fits(models, request, width_px=width, height_px=height, **beside)
    for line in left_out(
        models.unet,
        controls=bool(steering.controls),
        image_prompts=bool(steering.image_prompts),
        step_cache_interval=step_cache_interval,
    ):
        log.info(line)
    with _patched(models, adapters, check):
        plan = batches.plan(
            models,
            num_images=count,
            pixels=width * height,
            encodes=canvas is not None or len(sizes_px) > 1 or takes_mask(models.unet),
            **beside,
        )
        canvases = [canvas]
        if len(sizes_px) > 1:
            # Without a mask, what the first pass drew takes its place.
            larger = canvas.larger if canvas is not None else None
            canvases.append(larger if larger is not None and larger.mask is not None else None)
        encode = functools.partial(
            encode_canvas,
            vae=models.vae,
            device=models.device,
            sees_mask=takes_mask(models.unet),
        )
        encoded = [
            _encoding(functools.partial(encode, one, size_px), models, plan)
            for one, size_px in zip(canvases, sizes_px, strict=True)
        ]
        work = _Work(
            request=request,
            stages=stages,
            models=models,
            few_step=adapters.few_step,
            texts=_encode(request, stages, models, adapters.embeddings),
            canvas=encoded[0],
            larger_canvas=encoded[-1],
            enlarge=_enlarging(
                canvas, sizes_px[-1], steering.enlarge or enlarger(None, models.placement)
            ),
            may_be_black=canvas is not None and int(np.asarray(canvas.working).max()) < DARK,
            counter=StepCounter(on_step, total_steps(stages), count, models.device),
            steering=steering,
            step_cache_interval=step_cache_interval,
            unets={
                stage.name: _unet(stage, models, plan, shares_passes=shares_passes)
                for stage in stages
            },
        )
        return _draw_all(plan, work)


@contextlib.contextmanager
def _patched(models: Models, adapters: Adapters, check: Callable[[], None]) -> Iterator[None]:
    """With the LoRAs in the weights, which are as they were if anything fails."""
    patches = patches_of(models)
    try:
        patches.apply(adapters.loras, check)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        _make_room(models)
        second_tries.note("LoRAs applied again")
        patches.apply(adapters.loras, check)
    with patches.in_use():
        yield


def _unet(stage: Stage, models: Models, plan: batches.Plan, *, shares_passes: bool) -> Any:
    unet = models.unet if stage.name == "base" else models.refiner_unet
    return SharedUnet(unet, most_pictures=plan.most_at_once) if shares_passes else unet


def _draw_all(plan: batches.Plan, work: "_Work") -> list[Image.Image]:
    count, models = work.request.num_images, work.models
    pictures: list[Image.Image] = []
    while len(pictures) < count:
        batch = range(len(pictures), min(len(pictures) + plan.batch_size, count))
        try:
            with timesteps_on_device(*work.unets.values()):
                pictures += _draw(batch, plan, work)
        except RuntimeError as error:
            smaller = plan.smaller()
            if smaller is None or not is_out_of_memory(error):
                raise
            let_go(error)
            _make_room(models)
            second_tries.note("drawn in smaller batches")
            plan = smaller
    return pictures


@dataclass(frozen=True)
class _Work:
    """What the batches of a job share."""

    request: Request
    stages: Sequence[Stage]
    models: Models
    few_step: FewStep | None
    texts: Mapping[str, tuple[Encoding, Encoding]]
    """Prompt and negative prompt, by the name of the stage."""
    canvas: EncodedCanvas
    larger_canvas: EncodedCanvas
    """For the second pass of `hires`."""
    enlarge: Callable[[Image.Image], Image.Image]
    """What the first pass drew, to the size of the second."""
    may_be_black: bool
    counter: StepCounter
    steering: Steering
    step_cache_interval: int | None
    unets: Mapping[str, Any]
    """By the name of the stage: what its pipelines call."""


def _encode(
    request: Request,
    stages: Sequence[Stage],
    models: Models,
    embeddings: Sequence[TextualInversion],
) -> dict[str, tuple[Encoding, Encoding]]:
    patches = patches_of(models)
    encode = functools.partial(
        encode_pair,
        Texts.of(request),
        models,
        embeddings=embeddings,
        clip_skip=request.clip_skip,
    )

    def of_stages() -> dict[str, tuple[Encoding, Encoding]]:
        base = encode(state=patches.key if patches.touches_text_encoders else ())
        if not patches.touches_text_encoders or all(stage.name == "base" for stage in stages):
            return {"base": base, "refiner": base}
        # The refiner shares the second encoder, and was not trained with LoRAs of the base.
        with patches.text_encoders_unpatched():
            return {"base": base, "refiner": encode()}

    try:
        return of_stages()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        _make_room(models)
        second_tries.note("texts encoded again")
        return of_stages()


def _encoding(encode: Callable[[], T], models: Models, plan: batches.Plan) -> T:
    """What `encode` returns, which encodes by the VAE: in tiles where the memory does not do."""
    vae = models.vae
    with decoding_as_planned(vae, replace(plan, tiling=plan.encoding_tiled)):
        try:
            return encode()
        except RuntimeError as error:
            if vae.use_tiling or not is_out_of_memory(error):
                raise
            let_go(error)
            _make_room(models)
            second_tries.note("encoded in tiles")
            vae.use_tiling = True
            return encode()


def _make_room(models: Models) -> None:
    forget_recordings(models.unets())
    patches_of(models).move_originals_to_host()
    free_memory()


def _draw(batch: range, plan: batches.Plan, work: _Work) -> list[Image.Image]:
    """The pictures with these numbers, drawn a second time if something else came out.

    Raises:
        PictureError: as `generate`.
    """
    for is_last in (False, True):
        latents = _denoise(batch, plan, work)
        pictures = None if latents is None else _decode(latents, plan, work)
        if pictures is not None:
            return pictures
        if not is_last:
            second_tries.note("drawn again")
    raise PictureError(
        "the models gave no picture: numbers that are not finite, or all black, twice; try another "
        "seed or size; if it comes again, the worker's owner should try another DTYPE, or check "
        "the weights and the GPU"
    )


def _decode(latents: torch.Tensor, plan: batches.Plan, work: _Work) -> list[Image.Image] | None:
    """As `decode`."""
    vae = work.models.vae
    with decoding_as_planned(vae, plan):
        return decode(latents, vae, may_be_black=work.may_be_black)


def _denoise(batch: range, plan: batches.Plan, work: _Work) -> torch.Tensor | None:
    """Latents of the pictures with these numbers, [pictures, 4, height / 8, width / 8]; None: what
    was to be drawn larger is no picture."""
    request, models, canvas = work.request, work.models, work.canvas
    # Each picture has a generator of its own, on the CPU: picture i is what a request for one
    # picture with seed + i gives, within rounding, on any device. The refiner goes on with the
    # base's generator: from a fresh one it would add the same noise that the base began with.
    generators = [torch.Generator("cpu").manual_seed(request.seed_of(i)) for i in batch]
    work.counter.begin(batch.start, len(batch))
    has_negative = Texts.of(request).has_negative
    latents: Any = None
    keeper = None
    if canvas.picture is not None:
        latents = latents_of(canvas.picture, generators, models.vae)
        if canvas.repainted is not None:
            keeper = Keeper(latents, canvas.repainted)
    for stage in work.stages:
        if stage.is_second_pass:
            pictures = _decode(latents, plan, work)
            if pictures is None:
                return None
            canvas = work.larger_canvas
            latents, keeper = _enlarged(pictures, generators, plan, work)
        pipeline = _pipeline(stage, models, work.unets[stage.name])
        pipeline.scheduler = scheduler_of(stage, request, models, work.few_step)
        after_step = work.counter.callback(stage.label)
        # What the pipeline is about to draw, where it adds noise.
        ahead = [generator.clone_state() for generator in generators]
        shape = (len(batch), *canvas.latents_shape)
        noise = host_noise(shape, ahead, models.device, models.dtype)
        sees_mask = takes_mask(pipeline.unet)
        if latents is None:
            start, generators = {"latents": noise}, ahead
        else:
            start = {"image": latents}
        if keeper is not None:
            if stage.adds_noise:
                keeper.noise = noise
            if not sees_mask:  # one that does was trained to keep to it, and is disturbed by this
                start = {"image": keeper.start(start["image"], stage)}
                after_step = keeper.before(after_step, pipeline.scheduler)
        with contextlib.ExitStack() as around:
            around.enter_context(guided_until(pipeline, request.guidance_end))
            if sees_mask and canvas.surroundings is not None:
                surroundings = latents_of(canvas.surroundings, ahead, models.vae)
                around.enter_context(seeing(pipeline.unet, canvas.repainted, surroundings))
            # The refiner takes neither controls nor image prompts.
            steering = work.steering if stage.name == "base" else NO_STEERING
            is_steered = bool(steering.controls or steering.image_prompts)
            interval = None if is_steered else work.step_cache_interval
            around.enter_context(step_cache(pipeline, interval))
            around.enter_context(text_keys_kept(pipeline.unet))
            prompted = bool(steering.image_prompts)
            around.enter_context(compiled_where_it_can_be(pipeline.unet, image_prompts=prompted))
            image_prompts: dict[str, Any] = {}
            if is_steered:
                placement = models.placement
                around.enter_context(controlled(pipeline, steering.controls, placement))
                image_prompts = around.enter_context(
                    with_image_prompts(
                        pipeline,
                        steering.image_prompts,
                        placement,
                        guidance_scale=request.guidance_scale,
                        latents_size=shape[-2:],
                    )
                )
            latents = pipeline(
                **stage.options,
                **start,
                **image_prompts,
                **_embeddings(*work.texts[stage.name], pipeline, zeros_for_empty=not has_negative),
                guidance_scale=request.guidance_scale,
                guidance_rescale=_guidance_rescale(stage, work),
                num_images_per_prompt=len(batch),
                generator=generators,
                callback_on_step_end=after_step,
                output_type="latent",
            ).images
    return latents


def _enlarged(
    pictures: list[Image.Image],
    generators: Sequence[torch.Generator],
    plan: batches.Plan,
    work: _Work,
) -> tuple[torch.Tensor, Keeper | None]:
    """Latents of what the first pass drew, larger, and what keeps the rest of the input picture,
    which has then gone through no network but the VAE."""
    models, canvas = work.models, work.larger_canvas
    kept = None
    if canvas.picture is not None:
        ahead = [generator.clone_state() for generator in generators]
        kept = latents_of(canvas.picture, ahead, models.vae)
    drawn = []
    for picture, generator in zip(pictures, generators, strict=True):
        encode = functools.partial(encode_picture, work.enlarge(picture), models.vae, models.device)
        drawn.append(latents_of(_encoding(encode, models, plan), [generator], models.vae))
    latents = torch.cat(drawn)
    if kept is None or canvas.repainted is None:
        return latents, None
    return torch.where(canvas.repainted, latents, kept), Keeper(kept, canvas.repainted)


def _enlarging(
    canvas: Canvas | None, size_px: tuple[int, int], enlarge: Enlarge
) -> Callable[[Image.Image], Image.Image]:
    if canvas is None or canvas.larger is None:
        return lambda drawn: enlarge(drawn, size_px)
    return lambda drawn: canvas.enlarged(drawn, enlarge)


def _guidance_rescale(stage: Stage, work: _Work) -> float:
    if work.request.guidance_rescale is not None:
        return work.request.guidance_rescale
    return work.models.guidance_rescale_default if stage.name == "base" else 0.0


def _pipeline(stage: Stage, models: Models, unet: Any) -> Any:
    """A pipeline over the networks of a stage. Nothing is copied, so making one is cheap."""
    if stage.name == "base":
        own: dict[str, Any] = {
            "tokenizer": models.tokenizer,
            "text_encoder": models.text_encoder,
            "force_zeros_for_empty_prompt": models.zeros_for_empty_prompt,
        }
    else:
        own = {
            "tokenizer": None,
            "text_encoder": None,
            "force_zeros_for_empty_prompt": models.refiner_zeros_for_empty_prompt,
            "requires_aesthetics_score": models.refiner_takes_aesthetic_score,
        }
    pipeline = stage.pipeline(
        **own,
        unet=unet,
        tokenizer_2=models.tokenizer_2,
        text_encoder_2=models.text_encoder_2,
        vae=models.vae,
        scheduler=None,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
