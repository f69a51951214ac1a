"""What a picture's file tells of how it was made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import sdxl_worker
from sdxl_worker.outputs.exif import INFOTEXT, SOFTWARE
from sdxl_worker.request import TIES, Request, SchedulerName
from sdxl_worker.settings import MetadataLevel
from sdxl_worker.versions import library_versions
from sdxl_worker.wording import without_secrets

# Of an address of an input picture.
MAX_ADDRESS_CHARACTERS = 2000
PROMPTS = {"prompt", "negative_prompt"}
# They say how a picture is delivered, not how it is made.
OF_THE_DELIVERY = {"preview", "check", "on_too_large", "duplicate_first", "upload_urls"}
# What A1111 calls them. PNDM as Stable Diffusion has it, without Runge-Kutta steps, is PLMS. Of
# the single-step DPM-Solver++ of second order, which here adds no noise, A1111 has only the
# ancestral form; its "DPM++ SDE", to which diffusers' own table leads, is another solver.
SAMPLER_NAMES: Mapping[SchedulerName, str] = {
    "PNDM": "PLMS",
    "KLMS": "LMS",
    "DDIM": "DDIM",
    "K_EULER": "Euler",
    "K_EULER_ANCESTRAL": "Euler a",
    "DPMSolverMultistep": "DPM++ 2M",
    "DPMSolverSinglestep": "DPM++ 2S a",
}


@dataclass(frozen=True)
class About:
    """What the files tell of the worker, and how much they may tell."""

    model_name: str
    metadata: MetadataLevel
    model_hash: str | None = None
    """`ModelDir.hash`."""
    lossy: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """`Settings.lossy`."""


def describe(
    request: Request,
    index: int,
    size_px: tuple[int, int],
    about: About,
    level: MetadataLevel | None = None,
) -> dict[str, str]:
    """How picture `index` was made, by names of text chunks.

    "request" is an input that makes it again, alone, on a worker with the same "settings";
    "parameters" is the infotext of A1111.

    Args:
        request: as `as_drawn` returns it.
        size_px: width and height of the picture.
        level: None: that of `about`.
    """
    level = level or about.metadata
    if level == "none":
        return {}
    with_prompts = level == "all"
    return {
        SOFTWARE: f"sdxl-worker {sdxl_worker.__version__}",
        "model": about.model_name,
        "request": json.dumps(_again(request, index, with_prompts), ensure_ascii=False),
        "versions": json.dumps(library_versions(quantized="QUANTIZE" in about.lossy)),
        **({"settings": json.dumps(dict(about.lossy))} if about.lossy else {}),
        INFOTEXT: _infotext(request, index, size_px, about, with_prompts),
    }


def _again(request: Request, index: int, with_prompts: bool) -> dict[str, Any]:
    """Fields that only go with others are told where they are used."""
    again = request.model_copy(update={"seed": request.seed_of(index), "num_images": 1})
    fields = Request.model_fields
    unused = {tie.field for tie in TIES if getattr(request, tie.field) == fields[tie.field].default}
    if request.output_format in (None, "png"):
        unused.add("output_quality")
    prompts = set() if with_prompts else PROMPTS
    job_input = again.model_dump(exclude_none=True, exclude=OF_THE_DELIVERY | unused | prompts)
    for name in ("image_url", "mask_url"):
        if name in job_input:
            job_input[name] = _without_picture(job_input[name])
    return job_input


def _without_picture(image_url: str) -> str:
    """What the file may say of its source: an address without secrets, a data URI's type."""
    is_data = image_url[:5].lower() == "data:"
    told = image_url.partition(",")[0] if is_data else without_secrets(image_url)
    return told[:MAX_ADDRESS_CHARACTERS]


def _infotext(
    request: Request, index: int, size_px: tuple[int, int], about: About, with_prompts: bool
) -> str:
    """https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/infotext_utils.py

    Without a "Schedule type": the model's own configuration spaces the timesteps, and none of
    A1111's names stands for that.
    """
    width, height = size_px
    is_refined_only = request.image_url is not None and request.mode != "img2img"
    values = {
        "Steps": request.refiner_inference_steps
        if is_refined_only
        else request.num_inference_steps,
        "Sampler": SAMPLER_NAMES[request.scheduler],
        "CFG scale": request.guidance_scale,
        "Seed": request.seed_of(index),
        "Size": f"{width}x{height}",
        "Model hash": about.model_hash,
        "Model": about.model_name,
        "Denoising strength": None if request.image_url is None else request.strength,
        "Mask blur": request.mask_blur if request.is_masked else None,
        "Version": f"sdxl-worker {sdxl_worker.__version__}",
    }
    lines = [
        ", ".join(
            f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None
        )
    ]
    if with_prompts and request.negative_prompt:
        lines.insert(0, f"Negative prompt: {request.negative_prompt}")
    if with_prompts and request.prompt:
        lines.insert(0, request.prompt)
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """A value with separators in it is written as JSON."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(one in text for one in ",:\n") else text
