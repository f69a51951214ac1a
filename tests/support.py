"""What the tests share: jobs through `handler.handler`, and plain diffusers to compare with."""

import asyncio
import base64
import functools
import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

import handler
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steps import Step
from sdxl_worker.inputs.canvas import Canvas, prepare_canvas
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, add_refiner, load_base
from sdxl_worker.loading.weights import Weights, start_reading
from sdxl_worker.placement import Placement
from sdxl_worker.request import Request
from sdxl_worker.serving import turn
from sdxl_worker.serving.start import start
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed.optimize import optimize

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT = "a red circle on a blue background"
# The names of 2.1.0 and the classes of diffusers that they stood for.
SCHEDULERS = {
    "PNDM": "PNDMScheduler",
    "KLMS": "LMSDiscreteScheduler",
    "DDIM": "DDIMScheduler",
    "K_EULER": "EulerDiscreteScheduler",
    "K_EULER_ANCESTRAL": "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistep": "DPMSolverMultistepScheduler",
    "DPMSolverSinglestep": "DPMSolverSinglestepScheduler",
}

JOB = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "refiner_inference_steps": 8}
REQUESTS = {
    "base": {**JOB, "refiner_inference_steps": 0},
    "refined": {**JOB, "strength": 0.5},
    "ensemble": {**JOB, "high_noise_frac": 0.5},
}


def run(job_input: Any) -> dict[str, Any]:
    """One job through the handler, as the SDK would run it."""
    return asyncio.run(handler.handler({"id": "test", "input": job_input}))


def pictures(**job_input: Any) -> list[Image.Image]:
    """The pictures of a job that must succeed."""
    output = run(job_input)
    assert "error" not in output, output["error"]
    return [decoded(uri) for uri in output["images"]]


def picture(**job_input: Any) -> Image.Image:
    [only] = pictures(**job_input)
    return only


def error(job_input: Any) -> str:
    """The error of a job that must fail; it must be one string and nothing beside it."""
    output = run(job_input)
    assert list(output) == ["error"]
    assert isinstance(output["error"], str)
    return output["error"]


def decoded(data_uri: str) -> Image.Image:
    header, _, payload = data_uri.partition(",")
    assert header == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    image.load()
    assert (image.format, image.mode) == ("PNG", "RGB")
    return image


def data_uri(image: Image.Image, kind: str = "png", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference, on the scale 0 to 255."""
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def models() -> Models:
    """The models that the handler uses."""
    return start(Settings()).result()


def replace_generate(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    """What jobs call in place of `generate`; the worker's start, which draws too, is over."""
    models()
    monkeypatch.setattr(turn, "generate", function)


def draw(
    request: Request,
    some_models: Models,
    canvas: Canvas | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    *,
    step_cache_interval: int | None = None,
) -> list[Image.Image]:
    """What a worker with these models makes of a request."""
    return generate(
        request,
        plan_stages(request, some_models),
        some_models,
        canvas,
        on_step,
        step_cache_interval=step_cache_interval,
    )


def noise_picture(width: int, height: int, *, deviation: float = 40) -> Image.Image:
    """The same each time."""
    levels = np.random.default_rng(0).normal(128, deviation, (height, width)).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def canvas_of(picture: Image.Image, mask: np.ndarray | None = None, **options: Any) -> Canvas:
    """Of a picture of the right size.

    Args:
        mask: True where it is repainted.
        options: those of `prepare_canvas`.
    """
    defaults: dict[str, Any] = {
        "mask_blur": 0,
        "mask_padding": None,
        "native_size_px": 128,
        "max_side_px": 2048,
    }
    return prepare_canvas(picture, mask, **defaults, **options)


@functools.cache
def plain_base() -> StableDiffusionXLPipeline:
    """The base as a script of the diffusers documentation loads it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        EMBEDDED_MODEL_DIR / "base", variant="fp16", dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def plain_refiner() -> StableDiffusionXLImg2ImgPipeline:
    base = plain_base()
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        EMBEDDED_MODEL_DIR / "refiner",
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        variant="fp16",
        dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_being_read(
    device: str = "cpu", dtype: torch.dtype = torch.float32, *, without: str = ""
) -> Weights:
    """The embedded model's weights, begun to be read, but for a network."""
    model_dir = find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR))
    files = model_dir.weight_files("float16")
    files.pop(without, None)
    placement = Placement(torch.device(device), dtype, resident=True)
    return start_reading(model_dir, files, placement)


def load(weights: Weights) -> Models:
    """Base and refiner, as far as there is one."""
    return add_refiner(load_base(weights), weights)


def fresh_models(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Models:
    """Models of its own, which a test may change."""
    return load(weights_being_read(device, dtype))


def optimize_models(some_models: Models, optimizations: Collection[str]) -> None:
    assert some_models.refiner_unet is not None
    optimize(optimizations, some_models.unet, some_models.vae)
    optimize(optimizations, some_models.refiner_unet)
