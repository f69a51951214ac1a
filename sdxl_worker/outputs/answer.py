"""The answer: pictures as PNG data URIs that carry the parameters they were made with."""

import base64
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

import sdxl_worker
from sdxl_worker.errors import RequestError
from sdxl_worker.outputs.png import encode_png
from sdxl_worker.request import Request
from sdxl_worker.versions import library_versions
from sdxl_worker.wording import without_secrets

# What the platform takes as a result: https://docs.runpod.io/serverless/endpoints/operation-reference
RUN_LIMIT_BYTES = 10_000_000
RUNSYNC_LIMIT_BYTES = 20_000_000
# A picture of SDXL takes 1.5 to 2.8 bytes a pixel as PNG. A result that would be over the limit
# even with this is refused before it is made.
LEAST_PNG_BYTES_PER_PIXEL = 0.5

NOTHING: Mapping[str, Any] = MappingProxyType({})


def build_output(
    pictures: list[Image.Image],
    request: Request,
    *,
    model_name: str,
    lossy: Mapping[str, Any] = NOTHING,
    metadata: bool,
) -> dict[str, Any]:
    """The output of worker-sdxl 2.1.0: `images`, the first of them as `image_url`, the first seed.

    Args:
        pictures: RGB; picture i was made from `request.seed_of(i)`.
        request: as `as_drawn` returns it.
        lossy: `Settings.lossy` of the worker.
        metadata: whether the PNGs carry `describe(...)` as text chunks.
    """
    images = []
    for i, picture in enumerate(pictures):
        text = describe(request, i, model_name, lossy) if metadata else {}
        png = encode_png(np.asarray(picture), text)
        images.append("data:image/png;base64," + base64.b64encode(png).decode("ascii"))
    return {"images": images, "image_url": images[0], "seed": request.seed}


def limit_bytes(job_id: str) -> int:
    """How large the job's result may be. Jobs of /runsync have ids that begin with "sync-"."""
    return RUNSYNC_LIMIT_BYTES if job_id.startswith("sync-") else RUN_LIMIT_BYTES


def check_expected_size(num_images: int, pixels: int, job_id: str) -> None:
    """Refuse a request whose result is sure to be over the limit, before it is made.

    Args:
        pixels: of one picture.

    Raises:
        RequestError: with the expected size and what to do.
    """
    one = pixels * LEAST_PNG_BYTES_PER_PIXEL * 4 / 3  # base64
    _check_size(int(one * (num_images + 1)), job_id, "would be at least")


def check_size(output: dict[str, Any], job_id: str) -> None:
    """Refuse a result that the platform would not take, and would lose without a message.

    Raises:
        RequestError: with its size and what to do.
    """
    # Base64 is as long in JSON as it is here, and making JSON of it takes as long as the PNG took.
    pictures = [*output["images"], output["image_url"]]
    rest = {**output, "images": [""] * len(output["images"]), "image_url": ""}
    result = json.dumps({"output": rest}, allow_nan=False, ensure_ascii=False)
    size = len(result.encode("utf-8")) + sum(len(picture) for picture in pictures)
    _check_size(size, job_id, "is")


def _check_size(size: int, job_id: str, how: str) -> None:
    limit = limit_bytes(job_id)
    if size > limit:
        raise RequestError(
            f"the result {how} {size / 1e6:.1f} MB, and the platform takes {limit / 1e6:.0f} MB "
            "(10 for /run, 20 for /runsync); ask for fewer pictures (num_images) or smaller ones "
            "(height, width)"
        )


def describe(
    request: Request, index: int, model_name: str, lossy: Mapping[str, Any] = NOTHING
) -> dict[str, str]:
    """How picture `index` was made. "request" is an input that makes it again, alone, on a worker
    with the same "settings"."""
    again = request.model_copy(update={"seed": request.seed_of(index), "num_images": 1})
    job_input = again.model_dump(exclude_none=True, exclude={"preview", "check"})
    if request.image_url is not None:
        job_input["image_url"] = _without_picture(request.image_url)
    return {
        "Software": f"sdxl-worker {sdxl_worker.__version__}",
        "model": model_name,
        "request": json.dumps(job_input, ensure_ascii=False),
        "versions": json.dumps(library_versions(quantized="QUANTIZE" in lossy)),
        **({"settings": json.dumps(dict(lossy))} if lossy else {}),
    }


def _without_picture(image_url: str) -> str:
    """What the file may say of its source: an address without secrets, a data URI's type."""
    if image_url[:5].lower() == "data:":
        return image_url.partition(",")[0]
    return without_secrets(image_url)
