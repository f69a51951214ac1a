"""The platform's limit: a larger answer would be lost there without a message.

It counts where the answer holds the pictures themselves; links are short.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs.answer import build_output, data_uri, encode_pictures
from sdxl_worker.outputs.metadata import About
from sdxl_worker.request import Request
from sdxl_worker.settings import is_on_platform, is_on_runpod

# What the platform takes as a result: https://docs.runpod.io/serverless/endpoints/operation-reference
RUN_LIMIT_BYTES = 10_000_000
RUNSYNC_LIMIT_BYTES = 20_000_000
# Of a load-balancing endpoint: https://docs.runpod.io/serverless/load-balancing/overview
HTTP_LIMIT_BYTES = 30_000_000
# A picture of SDXL takes 1.5 to 2.8 bytes a pixel as PNG. A result that would be over the limit
# even with this is refused before it is made. Enlarged by Lanczos to four times its sides, a
# picture takes half as many bytes a pixel, to twice its sides 0.7 times as many (measured on noise
# with the spectra of photographs).
LEAST_PNG_BYTES_PER_PIXEL = 0.5
# Of one colour: deflate makes one byte of at most 1032.
LEAST_MAP_BYTES_PER_PIXEL = 3 / 1032
# More than an answer takes that has links to 16 pictures.
LINKS_BYTES = 100_000
# Below, JPEG shows little but its blocks.
LEAST_JPEG_QUALITY = 10
# Pictures of one request gain about the same from being encoded once more.
SPREAD_OF_THE_GAIN = 1.1


@dataclass(frozen=True)
class Fitted:
    """Pictures that the platform takes."""

    files: list[bytes]
    output_format: OutputFormat
    warning: str | None = None
    """That they are not what was asked for, in words."""


def limit_bytes(job_id: str) -> int | None:
    """How large the job's result may be. Jobs of /runsync have ids that begin with "sync-".

    None: as large as it gets, for local jobs, the SDK's test server and HTTP outside Runpod.
    """
    if not is_on_platform():
        return HTTP_LIMIT_BYTES if is_on_runpod() else None
    return RUNSYNC_LIMIT_BYTES if job_id.startswith("sync-") else RUN_LIMIT_BYTES


def check_expected_size(
    request: Request,
    pixels: int,
    output_format: OutputFormat,
    job_id: str,
    *,
    map_pixels: int = 0,
) -> None:
    """Refuse a request whose result is sure to be over the limit, before it is made.

    Only PNGs can be that: the least that 16 JPEGs of 4096 x 4096 pixels take is 1.6 MB (two bits
    for each block of 64 values), and no limit is as low. What is left of an input picture may be
    of one colour, and then takes next to nothing in a PNG as well.

    Args:
        pixels: of one picture as it comes out.
        map_pixels: of all maps that the answer holds, which may be of one colour.

    Raises:
        RequestError: with the expected size and what to do.
    """
    limit = limit_bytes(job_id)
    is_unchanged = (
        request.image_url is not None
        and request.mode != "img2img"
        and request.refiner_steps_run == 0
    )
    may_become_jpeg = output_format != "png" or request.on_too_large == "jpeg"
    if limit is None or may_become_jpeg or request.is_masked or is_unchanged:
        return
    factor = request.upscale.factor if request.upscale else 1.0
    one = pixels * LEAST_PNG_BYTES_PER_PIXEL / math.sqrt(factor) * 4 / 3  # base64
    maps = map_pixels * LEAST_MAP_BYTES_PER_PIXEL * 4 / 3
    size = int(one * (request.num_images + request.duplicate_first) + maps)
    if size > limit:
        remedies = ['output_format or on_too_large "jpeg"']
        if request.duplicate_first and one * request.num_images + maps <= limit:
            remedies.append("duplicate_first false")
        raise _too_large("would be at least", size, limit, remedies, request)


def fits_beside_links(size_bytes: int, job_id: str) -> bool:
    """Whether an answer whose pictures are links has room for so much more."""
    limit = limit_bytes(job_id)
    return limit is None or size_bytes + LINKS_BYTES <= limit


def fit(
    pictures: list[Image.Image],
    files: list[bytes],
    request: Request,
    job_id: str,
    *,
    output_format: OutputFormat,
    about: About,
    numbers: Sequence[int] | None = None,
    beside_bytes: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Fitted:
    """Make the pictures fit in an answer of data URIs, as far as the request allows.

    PNGs are encoded once more, smaller; then they become JPEGs, if `on_too_large` says so. That
    may take seconds: not for the event loop.

    Args:
        files: what `encode_pictures` made of the pictures.
        numbers: of the pictures, as there.
        beside_bytes: what else the answer holds.
        check: as there.

    Raises:
        RequestError: they do not; with the size and what would have helped.
    """
    limit = limit_bytes(job_id)
    size = result_bytes(files, request, output_format)
    if limit is None or size <= limit - beside_bytes:
        return Fitted(files, output_format)
    limit -= beside_bytes

    def png(some: list[Image.Image]) -> list[bytes]:
        of_some = numbers[: len(some)] if numbers else None
        return encode_pictures(
            some,
            request,
            output_format="png",
            about=about,
            numbers=of_some,
            smallest=True,
            check=check,
        )

    gain = 1.0
    if output_format == "png":
        gain = len(png(pictures[:1])[0]) / len(files[0])
        if size * gain <= limit * SPREAD_OF_THE_GAIN:
            files, gain = png(pictures), 1.0
            size = result_bytes(files, request, "png")
            if size <= limit:
                return Fitted(files, "png")

    def jpeg(quality: int) -> Fitted:
        warning = (
            f"as {output_format.upper()} the result is {size / 1e6:.1f} MB, and the platform "
            f"takes {limit / 1e6:.0f} MB: the pictures are JPEG of quality {quality}"
        )
        jpegs = encode_pictures(
            pictures,
            request,
            output_format="jpeg",
            about=about,
            numbers=numbers,
            quality=quality,
            check=check,
        )
        return Fitted(jpegs, "jpeg", warning)

    def jpeg_bytes(quality: int) -> int:
        fitted = jpeg(quality)
        return result_bytes(fitted.files, request, "jpeg", fitted.warning)

    qualities = range(LEAST_JPEG_QUALITY, max(LEAST_JPEG_QUALITY, request.output_quality) + 1)
    remedies = []
    if fitting := qualities[: bisect_right(qualities, limit, key=jpeg_bytes)]:
        quality = fitting[-1]
        if request.on_too_large == "jpeg":
            return jpeg(quality)
        told = f"quality {quality}, {jpeg_bytes(quality) / 1e6:.1f} MB"
        remedies.append(f'on_too_large "jpeg" ({told})')
    if request.duplicate_first:
        alone = request.model_copy(update={"duplicate_first": False})
        single_bytes = gain * result_bytes(files, alone, output_format)
        if single_bytes <= limit:
            remedies.append(f"duplicate_first false ({single_bytes / 1e6:.1f} MB)")
    raise _too_large("is", size, limit, remedies, request)


def result_bytes(
    files: list[bytes],
    request: Request,
    output_format: OutputFormat,
    warning: str | None = None,
) -> int:
    """The size of the result as JSON, with the pictures as data URIs."""
    # Base64 is as long in JSON as it is here, and making JSON of it takes as long as a PNG took.
    empty = build_output([data_uri(b"", output_format)] * len(files), request, warning=warning)
    lengths = [4 * ((len(file) + 2) // 3) for file in files]
    twice = lengths[0] if "image_url" in empty else 0
    return len(json.dumps({"output": empty}, allow_nan=False)) + sum(lengths) + twice


def _too_large(
    how: str, size: int, limit: int, remedies: list[str], request: Request
) -> RequestError:
    remedies = [
        *remedies,
        *(["/runsync"] if limit < size <= RUNSYNC_LIMIT_BYTES and limit <= RUN_LIMIT_BYTES else []),
        "links in place of pictures, by upload_urls or the worker's BUCKET_ENDPOINT_URL",
        *(["fewer pictures (num_images)"] if request.num_images > 1 else []),
        *(["a smaller upscale.factor"] if request.upscale else []),
        *(["a smaller hires.scale"] if request.hires and request.hires.scale > 1 else []),
        # Without a mode, a picture keeps its size.
        *(["smaller ones (height, width)"] if request.mode or not request.image_url else []),
    ]
    limits = " (10 for /run, 20 for /runsync)" if is_on_platform() else ""
    return RequestError(
        f"the result {how} {size / 1e6:.1f} MB, and the platform takes {limit / 1e6:.0f} MB"
        f"{limits}; each of these helps: {'; '.join(remedies)}"
    )
