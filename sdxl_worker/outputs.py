"""The answer: pictures as PNG data URIs that carry the parameters they were made with."""

import base64
import io
import json
from importlib.metadata import version
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sdxl_worker
from sdxl_worker.request import Request, without_secrets

# Level 1 takes about a third of the time of the default, for files about a tenth larger.
PNG_COMPRESS_LEVEL = 1


def build_output(
    pictures: list[Image.Image], request: Request, *, model_name: str, metadata: bool
) -> dict[str, Any]:
    """The output of worker-sdxl 2.1.0: `images`, the first of them as `image_url`, the first seed.

    Args:
        pictures: RGB; picture i was made from seed `request.seed + i`.
        metadata: whether the PNGs carry `describe(...)` as text chunks.
    """
    images = []
    for i, picture in enumerate(pictures):
        text = describe(request, i, model_name) if metadata else {}
        png = encode_png(picture, text)
        images.append("data:image/png;base64," + base64.b64encode(png).decode("ascii"))
    return {"images": images, "image_url": images[0], "seed": request.seed}


def encode_png(picture: Image.Image, text: dict[str, str]) -> bytes:
    """Lossless PNG with one international text chunk (iTXt, UTF-8) for each item of `text`."""
    chunks = PngInfo()
    for keyword, value in text.items():
        chunks.add_itxt(keyword, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=chunks, compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def describe(request: Request, index: int, model_name: str) -> dict[str, str]:
    """What made picture `index`: `request` is an input that makes it again, alone."""
    again = request.model_copy(update={"seed": request.seed + index, "num_images": 1})
    job_input = again.model_dump(exclude_none=True)
    if request.image_url is not None:
        job_input["image_url"] = _without_picture(request.image_url)
    libraries = {name: version(name) for name in ("diffusers", "torch", "transformers")}
    return {
        "Software": f"sdxl-worker {sdxl_worker.__version__}",
        "model": model_name,
        "request": json.dumps(job_input, ensure_ascii=False),
        "versions": json.dumps(libraries),
    }


def _without_picture(image_url: str) -> str:
    """What the file may tell of its source: an address without secrets, a data URI's type."""
    if image_url[:5].lower() == "data:":
        return image_url.partition(",")[0]
    return without_secrets(image_url)
