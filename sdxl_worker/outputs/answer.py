"""The answer: the output of worker-sdxl 2.1.0, with pictures as data URIs or as links."""

import base64
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image

from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs.exif import fits_jpeg
from sdxl_worker.outputs.files import MEDIA_TYPES, encode
from sdxl_worker.outputs.metadata import About, describe
from sdxl_worker.request import Request


def encode_pictures(
    pictures: list[Image.Image],
    request: Request,
    *,
    output_format: OutputFormat,
    about: About,
    numbers: Sequence[int] | None = None,
    quality: int | None = None,
    smallest: bool = False,
    check: Callable[[], None] = lambda: None,
) -> list[bytes]:
    """The pictures as files. It takes from milliseconds to seconds: not for the event loop.

    Args:
        pictures: RGB.
        request: as `as_drawn` returns it.
        numbers: of the pictures: i was made from `request.seed_of(i)`. None: from 0 on.
        quality: of JPEG and WebP. None: the request's.
        smallest: see `encode`.
        check: called before each picture. If it raises, encoding ends.
    """
    files, quality = [], quality or request.output_quality
    for i, picture in zip(numbers or range(len(pictures)), pictures, strict=True):
        check()
        text = describe(request, i, picture.size, about)
        if output_format == "jpeg" and text and not fits_jpeg(text):
            text = describe(request, i, picture.size, about, "no_prompts")
        files.append(encode(picture, output_format, quality, text, smallest=smallest))
    return files


def encode_maps(maps: Sequence[Image.Image]) -> list[bytes]:
    """Control maps as PNG. Not for the event loop either."""
    return [encode(picture, "png", 100, {}) for picture in maps]


def data_uri(data: bytes, output_format: OutputFormat) -> str:
    """A file inside the answer."""
    payload = base64.b64encode(data).decode("ascii")
    return f"data:{MEDIA_TYPES[output_format]};base64,{payload}"


def told_beside(maps: Sequence[bytes] = (), nsfw: Sequence[bool] | None = None) -> dict[str, Any]:
    """What an answer holds beside its pictures, where it was asked for.

    Args:
        maps: of `controlnet`, as PNG. They are in the answer itself, also where pictures are links.
        nsfw: of each picture, whether it was flagged. None: nobody looked.
    """
    return {
        **({"maps": [data_uri(file, "png") for file in maps]} if maps else {}),
        **({"nsfw": list(nsfw)} if nsfw is not None else {}),
    }


def build_output(
    images: list[str],
    request: Request,
    *,
    warning: str | None = None,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """`images`, the first of them as `image_url`, the seed of the first; and what went otherwise
    than asked for, in words.

    Args:
        images: data URIs or links. Of links, the first is given twice in any case.
        beside: what else is told, of `told_beside`.
    """
    is_twice = request.duplicate_first or not images[0].startswith("data:")
    return {
        "images": images,
        **({"image_url": images[0]} if is_twice else {}),
        "seed": request.seed,
        **beside,
        **({"warning": warning} if warning else {}),
    }
