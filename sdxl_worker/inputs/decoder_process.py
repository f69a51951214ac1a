"""Decoding apart, in a process that ends with it: what a stranger's bytes make of a decoder, in
memory, in time or in a crash, is not the worker's.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.request import MAX_SIDE_PX, MIN_SIDE_PX, SIDE_MULTIPLE_PX

# Of address space. The least that takes every picture of 64 megapixels: 12 bytes a pixel in a
# progressive CMYK JPEG (four of the pixel, eight of its coefficients), 11 in an AVIF with
# transparency, some 60 MB of Python and its libraries, and the file of up to 50 MB.
MAX_MEMORY_BYTES = 896 * 1024**2
# The largest pictures take 3 seconds, and 10 on two busy cores; a file can be made to take hours.
DECODE_TIMEOUT_SECONDS = 60

_PROGRAM = "sdxl_worker.inputs.decode"
_REPOSITORY = Path(__file__).parents[2]
# One picture at a time: the memory that decoding takes does not grow with the jobs at once.
_one_at_a_time = threading.Lock()


def decode_apart(
    data: bytes, field: str, *, height_px: int | None, width_px: int | None
) -> Image.Image:
    """The picture that `decode` and then `fit` make.

    Args:
        field: the place of `data` in the request, for messages.

    Raises:
        RequestError: theirs, or the decoder went over a limit or crashed.
    """
    arguments = {
        "memory_bytes": MAX_MEMORY_BYTES,
        "field": field,
        "height_px": height_px,
        "width_px": width_px,
        "bounds_px": (MIN_SIDE_PX, MAX_SIDE_PX, SIDE_MULTIPLE_PX),
    }
    with _one_at_a_time:
        try:
            finished = subprocess.run(  # noqa: S603 - this very program
                [sys.executable, "-m", _PROGRAM, json.dumps(arguments)],
                input=data,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=_REPOSITORY,
                # More arenas would count for the limit of memory without being used.
                env=os.environ | {"MALLOC_ARENA_MAX": "1"},
                timeout=DECODE_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise RequestError(
                f"{field}: the picture takes more than {DECODE_TIMEOUT_SECONDS} seconds to decode; "
                "send a smaller one, or save it anew as PNG"
            ) from None
    header, _, pixels = finished.stdout.partition(b"\n")
    if finished.returncode or not header:
        raise RequestError(f"{field}: the picture crashed its decoder; send a smaller one")
    answer = json.loads(header)
    if "refusal" in answer:
        raise RequestError(answer["refusal"])
    return Image.frombytes("RGB", answer["size"], pixels)
