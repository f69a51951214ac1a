"""Decoding apart, in a process that ends with it: what a stranger's bytes make of a decoder, in
memory, in time or in a crash, is not the worker's.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import MAX_SIDE_PX, MIN_SIDE_PX, SIDE_MULTIPLE_PX
from sdxl_worker.inputs.fitting import MAX_AUTOMATIC_SIDE_PX, Fit, FromAlpha, How
from sdxl_worker.inputs.masks import Mask

log = logging.getLogger(__name__)

# Of address space. The least that takes every picture of 64 megapixels: 12 bytes a pixel in a
# progressive CMYK JPEG (four of the pixel, eight of its coefficients), 11 in an AVIF with
# transparency, some 60 MB of Python and its libraries, and the file of up to 50 MB.
MAX_MEMORY_BYTES = 896 * 1024**2
# The largest pictures take 3 seconds of the CPU; a file can be made to take hours.
DECODE_CPU_SECONDS = 10
# On a machine that is too busy to give them.
DECODE_TIMEOUT_SECONDS = 60

_PROGRAM = "sdxl_worker.inputs.decode"
_REPOSITORY = Path(__file__).parents[2]
# No more is given to a decoder that a picture may take over: no credentials.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
# One picture at a time: the memory that decoding takes does not grow with the jobs at once.
_one_at_a_time: MutableMapping[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@dataclass(frozen=True)
class InputPicture:
    """A picture in the size that is drawn."""

    picture: Image.Image
    """RGB."""
    fit: Fit
    """How it came to its size."""
    mask: Mask | None
    """Its transparency, if that was asked for: true is what is repainted, [height, width]."""


async def decode_apart(
    data: bytes,
    field: str,
    *,
    height_px: int | None,
    width_px: int | None,
    how: How = "crop",
    masked: bool = False,
    mask_from_alpha: FromAlpha = False,
    mask_invert: bool = False,
) -> InputPicture:
    """The picture, in the size that the models take. Cancelled, it ends the process at once.

    Args:
        field: the place of `data` in the request, for messages.
        how: it comes to `height_px` and `width_px` where both are given.
        masked: with neither given, it keeps its size to the pixel.
        mask_from_alpha: what is transparent is a mask, or else what is opaque (`mask_invert`).
            "if_any": where nothing is transparent, there is no mask, and that is no mistake.

    Raises:
        RequestError: as `decode` and `choose_fit`; or the decoder went over a limit or crashed,
            or the mask is empty.
        RuntimeError: the program could not run.
    """
    sides_given = bool(height_px or width_px)
    largest = MAX_SIDE_PX if sides_given else MAX_AUTOMATIC_SIDE_PX
    bounds_px = (MIN_SIDE_PX, largest, SIDE_MULTIPLE_PX)
    masked_bounds_px = bounds_px if sides_given else (1, MAX_SIDE_PX, 1)
    answer, pixels = await _made_apart(
        data,
        make="picture",
        field=field,
        height_px=height_px,
        width_px=width_px,
        how=how,
        bounds_px=masked_bounds_px if masked else bounds_px,
        masked_bounds_px=masked_bounds_px,
        mask_from_alpha=mask_from_alpha,
        mask_invert=mask_invert,
    )
    width, height = answer["size"]
    end = width * height * 3
    return InputPicture(
        picture=Image.frombytes("RGB", (width, height), pixels[:end]),
        fit=Fit(tuple(answer["sent_size"]), (width, height), answer["how"]),
        mask=_as_mask(pixels[end:], (width, height)) if len(pixels) > end else None,
    )


async def decode_mask_apart(
    data: bytes,
    field: str,
    fit: Fit,
    *,
    from_alpha: bool = False,
    mask_invert: bool = False,
    repaints: bool = True,
) -> Mask:
    """A mask, fitted as the picture was that it belongs to. Cancelled, it ends the process at once.

    Args:
        field: the place of `data` in the request, for messages.
        fit: how the picture came to its size.
        from_alpha: what is transparent is repainted, whatever is white.
        mask_invert: what is black is repainted, not what is white; or what is opaque.
        repaints: see `mask_of`.

    Raises:
        RequestError: as `mask_of`; or the decoder went over a limit or crashed.
        RuntimeError: the program could not run.
    """
    _, pixels = await _made_apart(
        data,
        make="mask",
        field=field,
        sent_size=fit.sent_size,
        size=fit.size,
        how=fit.how,
        from_alpha=from_alpha,
        mask_invert=mask_invert,
        repaints=repaints,
    )
    return _as_mask(pixels, fit.size)


def _as_mask(pixels: bytes, size: tuple[int, int]) -> Mask:
    return np.frombuffer(pixels, bool).reshape(size[1], size[0])


async def _made_apart(data: bytes, field: str, **arguments: Any) -> tuple[dict[str, Any], bytes]:
    """The answer of the decoder, and the pixels."""
    limits = {"memory_bytes": MAX_MEMORY_BYTES, "cpu_seconds": DECODE_CPU_SECONDS}
    arguments |= {"field": field, **limits}
    async with _one_at_a_time.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        try:
            async with asyncio.timeout(DECODE_TIMEOUT_SECONDS):
                status, output, errors = await _run(json.dumps(arguments), data)
        except TimeoutError:
            status, output, errors = -signal.SIGXCPU, b"", b""
    if status == -signal.SIGXCPU:
        raise RequestError(
            f"{field}: the picture takes too long to decode; send a smaller one, or save it anew "
            "as PNG"
        )
    if status < 0:
        log.warning("a picture ended its decoder with signal %d", -status)
        raise RequestError(
            f"{field}: the picture crashed its decoder; save it anew, as PNG, or send a smaller one"
        )
    if status:
        raise RuntimeError(f"the decoder cannot run: {errors.decode(errors='replace')[-2000:]}")
    header, _, pixels = output.partition(b"\n")
    answer = json.loads(header)
    if "refusal" in answer:
        raise RequestError(answer["refusal"])
    return answer, pixels


async def _run(arguments: str, data: bytes) -> tuple[int, bytes, bytes]:
    """The status with which the program ended, what it wrote, and what it complained of."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", _PROGRAM, arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        cwd=_REPOSITORY,
        # More arenas, and numpy's threads, one for each core of the machine, would count for the
        # limit of memory without being used.
        env={"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
        | {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )
    try:
        output, errors = await process.communicate(data)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output, errors
