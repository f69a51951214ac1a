"""The report that a check job asks for."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

import sdxl_worker
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.drawing.inpainting import takes_mask
from sdxl_worker.drawing.second_tries import COUNTS
from sdxl_worker.gpu import peak_memory_bytes
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request
from sdxl_worker.settings import Settings
from sdxl_worker.versions import library_versions


def build_report(
    request: Request,
    models: Models,
    settings: Settings,
    pictures: list[Image.Image],
    generate_ms: float,
    steps: int,
    there: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """What monitoring wants to know, in under 2 kB: no pictures, but a digest of each.

    Args:
        generate_ms: of all pictures, decoding included; divided by `steps` for `ms_per_step`.
        there: what requests may name, by kind.
    """
    gpu = models.device.type == "cuda"
    patches = patches_of(models)
    return {
        "model": models.name,
        "revision": models.revision,
        "refiner": models.refiner_unet is not None,
        "kind": models.kind,
        "inpainting": takes_mask(models.unet),
        "loras": len(patches.key),
        "loras_originals_mb": round(patches.originals_bytes / 1e6),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "dtype": str(models.dtype).removeprefix("torch."),
        "step_cache": settings.step_cache,
        "quantization": settings.quantize,
        "fp16_accumulation": settings.fp16_accumulation,
        **there,
        "safety_checker": settings.safety_checker is not None,
        "second_tries": dict(COUNTS),
        "peak_memory_mb": round(peak_memory_bytes() / 1e6),
        "free_memory_mb": round(torch.cuda.mem_get_info()[0] / 1e6) if gpu else None,
        "versions": {
            "sdxl_worker": sdxl_worker.__version__,
            "runpod": version("runpod"),
            "cuda": torch.version.cuda,
            **library_versions(quantized=settings.quantize is not None),
        },
        "seed": request.seed,
        "width": pictures[0].width,
        "height": pictures[0].height,
        "steps": steps,
        "generate_ms": round(generate_ms),
        "ms_per_step": round(generate_ms / steps, 1) if steps else None,
        "sha256": [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures],
    }
