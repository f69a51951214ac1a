"""What a picture's file tells of how it was made."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sdxl_worker
from sdxl_worker.field_types import SIDE_MULTIPLE_PX, TEXT_FIELDS
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.outputs.exif import INFOTEXT, SOFTWARE
from sdxl_worker.request import Request
from sdxl_worker.request_ties import TIES
from sdxl_worker.samplers import SAMPLERS, SCHEDULES
from sdxl_worker.settings import MetadataLevel
from sdxl_worker.versions import library_versions
from sdxl_worker.wording import without_secrets

# Of an address of an input picture.
MAX_ADDRESS_CHARACTERS = 2000
# They say how a picture is delivered, not how it is made.
OF_THE_DELIVERY = {
    "preview",
    "check",
    "on_too_large",
    "duplicate_first",
    "upload_urls",
    "return_maps",
}
# Of pictures, in the request and in the objects inside it.
ADDRESSES = ("image_url", "mask_url")
# As many digits of a file's SHA-256 as Civitai finds it by.
HASH_DIGITS = 10


@dataclass(frozen=True)
class About:
    """What the files tell of the worker, and how much they may tell."""

    model_name: str
    metadata: MetadataLevel
    model_hash: str | None = None
    """`ModelDir.hash`."""
    lossy: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """`Settings.lossy`."""
    adapters: Mapping[str, AdapterFile] = field(default_factory=lambda: MappingProxyType({}))
    """By the place of their path in the request, such as "loras[0].path"."""
    few_step: str | None = None
    """The few-step model whose authors' settings were taken where the request had none."""
    controlnets: tuple[str, ...] = ()
    """The name of each entry of `controlnet`."""


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
    hashes = {file.name: file.sha256 for file in about.adapters.values()}
    return {
        SOFTWARE: f"sdxl-worker {sdxl_worker.__version__}",
        "model": about.model_name,
        "request": json.dumps(_again(request, index, about, with_prompts), ensure_ascii=False),
        "versions": json.dumps(library_versions(quantized="QUANTIZE" in about.lossy)),
        **({"settings": json.dumps(dict(about.lossy))} if about.lossy else {}),
        **({"adapters": json.dumps(hashes, ensure_ascii=False)} if hashes else {}),
        **({"few_step": about.few_step} if about.few_step else {}),
        INFOTEXT: _infotext(request, index, size_px, about, with_prompts),
    }


def _again(request: Request, index: int, about: About, with_prompts: bool) -> dict[str, Any]:
    """Fields that only go with others are told where they are used."""
    again = request.model_copy(update={"seed": request.seed_of(index), "num_images": 1})
    fields = Request.model_fields
    unused = {tie.field for tie in TIES if getattr(request, tie.field) == fields[tie.field].default}
    if request.output_format in (None, "png"):
        unused.add("output_quality")
    if not request.prompt_weighting:
        unused.add("prompt_weighting")
    if request.guidance_end == 1:
        unused.add("guidance_end")
    prompts = set() if with_prompts else {*TEXT_FIELDS}
    job_input = again.model_dump(exclude_none=True, exclude=OF_THE_DELIVERY | unused | prompts)
    for holder in (job_input, *_entries(job_input)):
        for name in ADDRESSES:
            if name in holder:
                holder[name] = _without_picture(holder[name])
    for name in ("loras", "embeddings"):
        for i, one in enumerate(job_input.get(name, ())):
            # A path to the same file, without what may be secret in the one that was sent.
            one["path"] = about.adapters[f"{name}[{i}].path"].name[:MAX_ADDRESS_CHARACTERS]
    return job_input


def _entries(job_input: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that have pictures of their own."""
    for name in ("controlnet", "ip_adapter"):
        yield from job_input.get(name, ())


def _without_picture(image_url: str) -> str:
    """What the file may say of its source: an address without secrets, a data URI's type."""
    is_data = image_url[:5].lower() == "data:"
    told = image_url.partition(",")[0] if is_data else without_secrets(image_url)
    return told[:MAX_ADDRESS_CHARACTERS]


def _infotext(
    request: Request, index: int, size_px: tuple[int, int], about: About, with_prompts: bool
) -> str:
    """https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/infotext_utils.py

    Without a "Schedule type" where the model's own configuration spaces the timesteps: none of
    A1111's names stands for that.
    """
    loras = [
        (Path(file.name).stem, file.sha256, lora.scale)
        for i, lora in enumerate(request.loras or ())
        for file in [about.adapters[f"loras[{i}].path"]]
    ]
    width, height = _first_size_px(request, size_px)
    hires, upscale = request.hires, request.upscale
    is_refined_only = request.image_url is not None and request.mode != "img2img"
    values = {
        "Steps": request.refiner_inference_steps
        if is_refined_only
        else request.num_inference_steps,
        "Sampler": SAMPLERS[request.scheduler].infotext,
        "Schedule type": SCHEDULES[request.schedule or "normal"].infotext,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed_of(index),
        "Size": f"{width}x{height}",
        "Model hash": about.model_hash,
        "Model": about.model_name,
        "Denoising strength": request.strength
        if request.image_url is not None
        else hires and hires.strength,
        "Mask blur": request.mask_blur if request.is_masked else None,
        "Hires upscale": hires and hires.scale,
        "Hires steps": hires and hires.steps,
        "Hires upscaler": hires and _upscaler(hires.upscaler),
        "Postprocess upscale by": upscale and upscale.factor,
        "Postprocess upscaler": upscale and _upscaler(upscale.upscaler),
        **_controlnets(request, about),
        "Lora hashes": ", ".join(f"{name}: {sha[:HASH_DIGITS]}" for name, sha, _ in loras) or None,
        "Version": f"sdxl-worker {sdxl_worker.__version__}",
    }
    lines = [
        ", ".join(
            f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None
        )
    ]
    if with_prompts and request.negative_prompt:
        lines.insert(0, f"Negative prompt: {request.negative_prompt}")
    if with_prompts and (request.prompt or loras):
        words = [request.prompt, *(f"<lora:{name}:{scale:g}>" for name, _, scale in loras)]
        lines.insert(0, " ".join(filter(None, words)))
    return "\n".join(lines)


def _first_size_px(request: Request, size_px: tuple[int, int]) -> tuple[int, int]:
    """Of a picture before it was enlarged: to A1111, that is its size."""
    width, height = size_px
    if request.upscale is not None:
        width, height = (round(side / request.upscale.factor) for side in (width, height))
    if request.hires is not None:
        step = 1 if request.is_masked else SIDE_MULTIPLE_PX
        width, height = (
            step * round(side / request.hires.scale / step) for side in (width, height)
        )
    return width, height


def _upscaler(name: str) -> str:
    """As A1111 has it."""
    return "Lanczos" if name == "lanczos" else Path(name).stem


def _controlnets(request: Request, about: About) -> dict[str, str]:
    """https://github.com/Mikubill/sd-webui-controlnet/blob/main/scripts/infotext.py"""
    names = about.controlnets or ("None",) * len(request.controlnet or ())
    return {
        f"ControlNet {i}": ", ".join(
            f"{key}: {value}"
            for key, value in {
                "Module": one.type if one.preprocess else "none",
                # Nothing may look like another of the keys.
                "Model": re.sub("[,:]", " ", name),
                "Weight": one.scale,
                "Guidance Start": one.start,
                "Guidance End": one.end,
            }.items()
        )
        for i, (one, name) in enumerate(zip(request.controlnet or (), names, strict=True))
    }


def _quoted(value: object) -> str:
    """A value with separators in it is written as JSON."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(one in text for one in ",:\n") else text
