"""Ways to draw the same request: the worker's, plain diffusers, and that of worker-sdxl 2.1.0."""

import base64
import contextlib
import copy
import functools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch._inductor import config as inductor_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.loading.models import Models
from sdxl_worker.outputs.answer import data_uri, encode_pictures
from sdxl_worker.outputs.metadata import About
from sdxl_worker.request import Request
from sdxl_worker.samplers import SAMPLERS, SamplerName
from sdxl_worker.speed.compiling import at_the_start
from sdxl_worker.speed.optimize import optimize

OnStep = Callable[[str], None]
"""Called after each denoising step with "base" or "refiner"."""


class Way(ABC):
    @abstractmethod
    def draw(self, request: Request, on_step: OnStep) -> list[Image.Image]:
        """From the request to pictures on the host."""

    @abstractmethod
    def encode(self, pictures: list[Image.Image], request: Request) -> list[str]:
        """The pictures as base64, as the answer holds them."""


class Worker(Way):
    """This worker, with some of `OPTIMIZATIONS`. The first picture stands for its start."""

    def __init__(
        self,
        models: Models,
        optimizations: Collection[str],
        step_cache_interval: int | None = None,
    ) -> None:
        self._models = models
        self._step_cache_interval = step_cache_interval
        optimize(optimizations, models.unet, models.vae)
        optimize(optimizations, models.refiner_unet)
        self._starting: Callable[[], AbstractContextManager[None]] = functools.partial(
            at_the_start, optimizations
        )

    def draw(self, request: Request, on_step: OnStep) -> list[Image.Image]:
        with self._starting():
            pictures = generate(
                request,
                plan_stages(request, self._models),
                self._models,
                on_step=lambda step: on_step(step.stage),
                step_cache_interval=self._step_cache_interval,
            )
        self._starting = contextlib.nullcontext
        return pictures

    def encode(self, pictures: list[Image.Image], request: Request) -> list[str]:
        about = About("benchmark", "all")
        files = encode_pictures(pictures, request, output_format="png", about=about)
        return [data_uri(data, "png") for data in files]


class FlashAttention(Worker):
    """With FlashAttention 2, where torch may prefer cuDNN's."""

    def draw(self, request: Request, on_step: OnStep) -> list[Image.Image]:
        order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            return super().draw(request, on_step)


class OneSize(Worker):
    """Compiled for each shape alone, within its first picture: what the worker's code for all
    shapes costs."""

    def draw(self, request: Request, on_step: OnStep) -> list[Image.Image]:
        self._starting = contextlib.nullcontext
        with (
            torch.compiler.set_stance("default"),
            torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64),
        ):
            return super().draw(request, on_step)


class Tuned(Worker):
    """Compiled as for the fastest published figures: each product, convolution and kernel in the
    fastest of many variants, which takes many minutes to try.
    https://github.com/huggingface/diffusion-fast
    """

    def draw(self, request: Request, on_step: OnStep) -> list[Image.Image]:
        with inductor_config.patch(
            max_autotune=True,
            conv_1x1_as_mm=True,
            coordinate_descent_tuning=True,
            coordinate_descent_check_all_directions=True,
            epilogue_fusion=False,
        ):
            return super().draw(request, on_step)


class Diffusers(Way):
    """As in its documentation: all on the device, the second text encoder and the VAE shared."""

    def __init__(self, models: Models) -> None:
        self._config = dict(models.scheduler_config)
        self.base = StableDiffusionXLPipeline(
            tokenizer=models.tokenizer,
            tokenizer_2=models.tokenizer_2,
            text_encoder=models.text_encoder,
            text_encoder_2=models.text_encoder_2,
            unet=models.unet,
            vae=models.vae,
            scheduler=None,
            add_watermarker=False,
        )
        self.refiner = StableDiffusionXLImg2ImgPipeline(
            **self._shared({"vae": models.vae, "text_encoder_2": models.text_encoder_2}),
            tokenizer=None,
            tokenizer_2=models.tokenizer_2,
            text_encoder=None,
            unet=models.refiner_unet,
            scheduler=None,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        for pipeline in (self.base, self.refiner):
            pipeline.set_progress_bar_config(disable=True)

    def draw(self, request: Request, on_step: OnStep) -> list[Image.Image]:
        # With the worker's seeds, so that the pictures can be compared.
        generators = [
            torch.Generator("cpu").manual_seed(request.seed + i) for i in range(request.num_images)
        ]
        for pipeline in (self.base, self.refiner):
            pipeline.scheduler = self._scheduler(request.scheduler)
        both = {
            "prompt": request.prompt,
            "guidance_scale": request.guidance_scale,
            "num_images_per_prompt": request.num_images,
            "generator": generators,
        }
        return self._draw(request, on_step, for_base=both, for_refiner=both)

    def encode(self, pictures: list[Image.Image], request: Request) -> list[str]:  # noqa: ARG002
        """With Pillow at its default level, 6, by way of a file."""
        texts = []
        with tempfile.TemporaryDirectory() as folder:
            for i, picture in enumerate(pictures):
                path = Path(folder, f"{i}.png")
                picture.save(path)
                texts.append(base64.b64encode(path.read_bytes()).decode())
        return texts

    def _scheduler(self, name: SamplerName) -> Any:
        return getattr(diffusers, SAMPLERS[name].class_name).from_config(self._config)

    def _shared(self, networks: dict[str, Any]) -> dict[str, Any]:
        """What the refiner takes of the base's networks."""
        return networks

    def _draw(
        self,
        request: Request,
        on_step: OnStep,
        *,
        for_base: dict[str, Any],
        for_refiner: dict[str, Any],
    ) -> list[Image.Image]:
        def after(stage: str) -> Callable[..., dict[str, Any]]:
            def after_step(*_: Any) -> dict[str, Any]:
                on_step(stage)
                return {}

            return after_step

        latents = self.base(
            **for_base,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            output_type="latent",
            callback_on_step_end=after("base"),
        ).images
        return self.refiner(
            **for_refiner,
            image=latents,
            num_inference_steps=request.refiner_inference_steps,
            strength=request.strength,
            callback_on_step_end=after("refiner"),
        ).images


class Version210(Diffusers):
    """worker-sdxl 2.1.0's settings, re-created: both pipelines moved to the GPU network by network
    and back in each job, the VAE and the second text encoder loaded twice, one generator for all,
    the refiner with an Euler scheduler of its own and without guidance scale or negative prompt.

    Its xFormers attention is not at hand. In its place is torch's own, which was measured elsewhere
    to be 3% slower.
    """

    def __init__(self, models: Models) -> None:
        super().__init__(models)
        self._device = models.device
        if self._device.type == "cuda":
            for pipeline in (self.base, self.refiner):
                pipeline.enable_model_cpu_offload()

    def draw(self, request: Request, on_step: OnStep) -> list[Image.Image]:
        schedulers = {name: self._scheduler(name) for name in SAMPLERS}
        self.base.scheduler = schedulers[request.scheduler]
        self.refiner.scheduler = EulerDiscreteScheduler.from_config(self._config)
        both = {
            "prompt": request.prompt,
            "num_images_per_prompt": request.num_images,
            "generator": torch.Generator(self._device).manual_seed(request.seed),
        }
        for_base = {
            **both,
            "negative_prompt": request.negative_prompt or None,
            "guidance_scale": request.guidance_scale,
        }
        return self._draw(request, on_step, for_base=for_base, for_refiner=both)

    def _shared(self, networks: dict[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(networks)


def psnr_db(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio; 99 for pictures that are the same."""
    error = np.stack([np.asarray(picture, np.float64) for picture in pictures])
    error -= np.stack([np.asarray(picture) for picture in others])
    mean_square = float((error**2).mean())
    return 99.0 if mean_square == 0 else min(99.0, float(10 * np.log10(255**2 / mean_square)))
