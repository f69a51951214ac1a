"""Pictures as prompts: as plain diffusers has them, and nothing of them stays."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    StableDiffusionXLPipeline,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.image_prompts import ImagePrompt, encode_picture
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steering import Steering
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.loading.ip_adapters import find_ip_adapter
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request, parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from sdxl_worker.speed.optimize import optimize
from tests.random_ip_adapters import ENCODER, make_ip_adapters
from tests.support import canvas_of, draw, fresh_models, largest_difference, noise_picture

JOB = {
    "prompt": "a red circle on a blue background",
    "seed": 3,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "refiner_inference_steps": 0,
}
STYLE = {"up": {"block_0": [0.0, 1.0]}}
LAYOUT = {"down": {"block_2": [1.0]}}


def reference(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def models() -> Models:
    return fresh_models()


@pytest.fixture(scope="module")
def folder(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ip-adapters")
    make_ip_adapters(folder, models.unet)
    return folder


def prompt_of(
    models: Models, folder: Path, kind: str, *, seed: int = 0, scale: float = 1, mask: Any = None
) -> ImagePrompt:
    files = find_ip_adapter(kind, folder, "ip_adapter[0].type")
    adapter, encoder = files.load(models.placement), files.encoder.load(models.placement)
    tokens = encode_picture(reference(seed), encoder, adapter, models.placement)
    return ImagePrompt(adapter, tokens, kind, scale, mask)


def drawn(
    models: Models,
    prompts: Sequence[ImagePrompt],
    canvas: Canvas | None = None,
    **job: Any,
) -> list[Image.Image]:
    request = request_of(**job)
    steering = Steering(image_prompts=tuple(prompts))
    return generate(request, plan_stages(request, models), models, canvas, steering=steering)


def request_of(**job: Any) -> Request:
    return parse_request({**JOB, **job})


def plain(folder: Path, names: list[str], scales: Any) -> StableDiffusionXLPipeline:
    """As a script of the diffusers documentation has it."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / ENCODER)
    side = encoder.config.image_size
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        EMBEDDED_MODEL_DIR / "base",
        variant="fp16",
        dtype=torch.float32,
        image_encoder=encoder,
        feature_extractor=CLIPImageProcessorPil(size=side, crop_size=side),
    )
    pipeline.load_ip_adapter(
        str(folder), subfolder="sdxl_models", weight_name=names, image_encoder_folder=None
    )
    pipeline.set_ip_adapter_scale(scales)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PLAIN, PLUS = "ip-adapter_sdxl_vit-h.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors"


@pytest.mark.parametrize(
    ("entries", "names", "scales"),
    [
        ([("plain", 1)], [PLAIN], 1.0),
        ([("plain", 0.5)], [PLAIN], 0.5),
        ([("plus", 1)], [PLUS], 1.0),
        ([("style", 1)], [PLUS], STYLE),
        ([("layout", 1), ("style", 1)], [PLUS, PLUS], [LAYOUT, STYLE]),
        ([("plain", 0.4), ("plus", 0.7)], [PLAIN, PLUS], [0.4, 0.7]),
    ],
)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_pictures_from_text_are_those_of_plain_diffusers(
    models: Models,
    folder: Path,
    entries: list[tuple[str, float]],
    names: list[str],
    scales: Any,
    guidance_scale: float,
) -> None:
    prompts = [
        prompt_of(models, folder, kind, seed=i, scale=scale)
        for i, (kind, scale) in enumerate(entries)
    ]
    pipeline = plain(folder, names, scales)
    [expected] = pipeline(
        JOB["prompt"],
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(3),
        ip_adapter_image=[reference(i) for i in range(len(entries))],
    ).images
    [picture] = drawn(models, prompts, guidance_scale=guidance_scale)
    print("DIFF", largest_difference(picture, expected), largest_difference(picture, drawn(models, [], guidance_scale=guidance_scale)[0]))
    assert largest_difference(picture, expected) <= 1
