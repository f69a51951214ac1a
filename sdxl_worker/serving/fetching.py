"""The files that a request names are fetched, and its pictures decoded.

They are LoRAs and embeddings, the picture to start from and its mask, control pictures and pictures
as prompts.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_worker.drawing.stages import Stage, drawn_sizes_px
from sdxl_worker.field_types import MAX_SIDE_PX
from sdxl_worker.inputs.adapter_files import fetch_adapters
from sdxl_worker.inputs.canvas import Canvas, prepare_canvas, with_holes_filled
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.inputs.decoder_process import decode_apart, decode_mask_apart
from sdxl_worker.inputs.fetch import fetch
from sdxl_worker.inputs.fitting import MAX_AUTOMATIC_SIDE_PX
from sdxl_worker.inputs.references import (
    NO_REFERENCES,
    References,
    addresses_of,
    decode_references,
    prepare_references,
    references_of,
)
from sdxl_worker.request import Request
from sdxl_worker.serving.beside import Beside
from sdxl_worker.serving.ending import not_holding_the_end
from sdxl_worker.serving.logs import timed
from sdxl_worker.serving.progress import Progress
from sdxl_worker.serving.threads import in_thread
from sdxl_worker.settings import Settings

# Control pictures and pictures as prompts that are in memory as they were sent.
FILES_AT_ONCE = 2


async def fetch_adapter_files(
    request: Request, settings: Settings, progress: Progress, job_id: str
) -> dict[str, AdapterFile]:
    """The files of LoRAs and embeddings, by the place of their path in the request.

    Raises:
        RequestError: one cannot be had.
    """
    paths = {
        f"{field}[{i}].path": one.path
        for field in ("loras", "embeddings")
        for i, one in enumerate(getattr(request, field) or ())
    }
    if not paths:
        return {}
    with timed("fetch_adapters", job_id):
        async with not_holding_the_end("the LoRAs and embeddings"):
            return await fetch_adapters(paths, settings, progress.on_bytes)


async def fetch_canvas(
    request: Request, native_size_px: int, job_id: str, *, takes_holes: bool
) -> Canvas:
    """What is drawn on: the picture of `image_url` and its mask.

    Args:
        takes_holes: what is transparent in the picture is its mask, if anything is.

    Raises:
        RequestError: one of them cannot be had, or they do not go together.
    """
    async with not_holding_the_end("the picture of image_url"):
        with timed("fetch", job_id):
            fields = ("image_url", "mask_url")
            given = {name: getattr(request, name) for name in fields}
            contents = await _fetch_side_by_side(
                {name: address for name, address in given.items() if address is not None}
            )
        # Without a mode, image_url keeps its size whatever the other fields say, as in 2.1.0.
        sides = (request.height, request.width) if request.mode else (None, None)
        has_mask_file = request.mask_url is not None
        with timed("decode", job_id):
            decoded = await decode_apart(
                contents["image_url"],
                "image_url",
                height_px=sides[0],
                width_px=sides[1],
                how=request.fit,
                masked=request.is_masked,
                mask_from_alpha="if_any"
                if takes_holes
                else request.mask_from_alpha and not has_mask_file,
                mask_invert=request.mask_invert,
            )
            picture, mask = decoded.picture, decoded.mask
            if has_mask_file:
                mask = await decode_mask_apart(
                    contents["mask_url"],
                    "mask_url",
                    decoded.fit,
                    from_alpha=request.mask_from_alpha,
                    mask_invert=request.mask_invert,
                )
            elif mask is not None and not request.mask_invert:
                # What is transparent has no colour, and white would shine through what is drawn.
                picture = await in_thread(with_holes_filled, picture, mask)
            return await in_thread(
                prepare_canvas,
                picture,
                mask,
                mask_blur=request.mask_blur,
                mask_padding=request.mask_padding,
                native_size_px=native_size_px,
                max_side_px=MAX_SIDE_PX if any(sides) else MAX_AUTOMATIC_SIDE_PX,
            )


async def fetch_references(
    request: Request,
    stages: Sequence[Stage],
    canvas: Canvas | None,
    beside: Beside,
    job_id: str,
) -> References:
    """The pictures of `controlnet` and `ip_adapter`: maps as far as the CPU makes them.

    Raises:
        RequestError: one of them cannot be had, or does not become what it should.
    """
    addresses = addresses_of(request)
    if not addresses:
        return NO_REFERENCES
    size = canvas.picture.size if canvas is not None else drawn_sizes_px(stages, None)[0]
    async with not_holding_the_end("the pictures of controlnet and ip_adapter"):
        decoded: dict[str, Any] = {}
        for some in _in_parts(addresses, FILES_AT_ONCE):
            with timed("fetch", job_id):
                contents = await _fetch_side_by_side(some)
            with timed("decode", job_id):
                decoded |= await decode_references(request, contents, size)
            del contents  # before the next are fetched
        references = references_of(request, decoded)
        with timed("decode", job_id):
            return await in_thread(prepare_references, references, request, canvas, beside.pose)


def _in_parts(addresses: Mapping[str, str], at_most: int) -> list[dict[str, str]]:
    """Of no more different addresses each."""
    different = list(dict.fromkeys(addresses.values()))
    return [
        {field: one for field, one in addresses.items() if one in different[i : i + at_most]}
        for i in range(0, len(different), at_most)
    ]


async def _fetch_side_by_side(addresses: Mapping[str, str]) -> dict[str, bytes]:
    """What is at the addresses, by field. What several fields name is fetched once."""
    fields: dict[str, str] = {}
    for field, address in addresses.items():
        fields.setdefault(address, field)
    fetching = [asyncio.ensure_future(fetch(address, fields[address])) for address in fields]
    try:
        found = dict(zip(fields, await asyncio.gather(*fetching), strict=True))
        return {field: found[address] for field, address in addresses.items()}
    finally:
        for one in fetching:
            one.cancel()
