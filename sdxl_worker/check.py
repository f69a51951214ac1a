"""Whether the worker works: the check at start-up, and the report that a check job asks for."""

import hashlib
import logging
import platform
import time
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

import sdxl_worker
from sdxl_worker import compile_cache
from sdxl_worker.errors import ModelError
from sdxl_worker.generate import generate
from sdxl_worker.gpu import peak_memory_bytes
from sdxl_worker.models import Models, load_models
from sdxl_worker.optimize import MODES, for_one_size
from sdxl_worker.outputs import library_versions
from sdxl_worker.request import CHECK_INPUT, Request, parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.weights import Weights

log = logging.getLogger(__name__)

# On a CPU a full-size model takes minutes at its native size.
CPU_CHECK_SIZE_PX = 64


def build_report(
    request: Request,
    models: Models,
    pictures: list[Image.Image],
    *,
    generate_ms: float,
    steps: int,
) -> dict[str, Any]:
    """What monitoring wants to know, in under 2 kB: no picture, but the digest of each.

    Args:
        generate_ms: of all pictures, decoding included; shared out over `steps`.
    """
    gpu = models.device.type == "cuda"
    return {
        "model": models.name,
        "revision": models.revision,
        "refiner": models.refiner is not None,
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "dtype": str(models.dtype).removeprefix("torch."),
        "step_cache": models.step_cache,
        "quantization": models.quantization,
        "peak_memory_mb": round(peak_memory_bytes() / 1e6),
        "free_memory_mb": round(torch.cuda.mem_get_info()[0] / 1e6) if gpu else None,
        "versions": {
            "sdxl_worker": sdxl_worker.__version__,
            "runpod": version("runpod"),
            "cuda": torch.version.cuda,
            **library_versions(quantized=models.quantization is not None),
        },
        "seed": request.seed,
        "width": pictures[0].width,
        "height": pictures[0].height,
        "steps": steps,
        "generate_ms": round(generate_ms),
        "ms_per_step": round(generate_ms / steps, 1) if steps else None,
        "sha256": [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures],
    }


def prepare(settings: Settings, weights: Weights) -> None:
    """Load the models and draw one small picture with them, before the first job is taken.

    Args:
        weights: what began to be read for these settings.

    Raises:
        ModelError: they cannot be loaded, or draw nothing: the GPU or the weights are broken.
    """
    started = time.perf_counter()
    # The first picture costs more than later ones. The base's is drawn while the weights of the
    # refiner are still being read.
    with compile_cache.kept(settings, weights), for_one_size(MODES[settings.compile]):
        models = load_models(settings, weights, on_base=_draw)
        loaded = time.perf_counter()
        _log_seconds("loaded the models", loaded - started)
        picture = _draw(models)
    _log_seconds("warmed up", time.perf_counter() - loaded)
    # Numbers that are not finite become one even colour.
    if len(picture.getcolors(picture.width * picture.height) or []) == 1:
        raise ModelError("the models draw an empty picture: the GPU or the weights are broken")


def _draw(models: Models) -> Image.Image:
    size = None if models.device.type == "cuda" else CPU_CHECK_SIZE_PX
    return generate(parse_request({**CHECK_INPUT, "height": size, "width": size}), models)[0]


def _log_seconds(what: str, seconds: float) -> None:
    log.info("%s in %.1f s", what, seconds, extra={"seconds": round(seconds, 2)})
