"""The header of a safetensors file, and what a file is that has none.

https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON text, that text with
each tensor's dtype, shape and place, and the tensors. What is read here may come from a stranger.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8
# The library takes 100 MB, of which hostile JSON makes gigabytes of Python's objects. The largest
# headers there are, those with all captions of a training, have a few MB.
MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 64  # torch's
METADATA = "__metadata__"
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# Bytes that tell what else a file is.
PROBE_BYTES = 1024

TAKE_SAFETENSORS = "use the .safetensors file of the same model"
PICKLE = f"a PyTorch pickle (.ckpt, .pt, .bin), which can run any code: {TAKE_SAFETENSORS}"
ARCHIVE = "an archive: unpack it and use the .safetensors file in it"
STARTS = (
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"PK\x03\x04", ARCHIVE),
    (b"\x1f\x8b", ARCHIVE),
    (b"7z\xbc\xaf", ARCHIVE),
    (b"Rar!", ARCHIVE),
    (b"GGUF", f"a GGUF file: {TAKE_SAFETENSORS}"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, which stands for the file: fetch the file itself (git lfs pull)",
    ),
)
TEXTS = (
    (b"<!doctype html", "a web page, perhaps one to log in: use the address of the file itself"),
    (b"<html", "a web page, perhaps one to log in: use the address of the file itself"),
    (b"<", "XML, perhaps a server's error message: use the address of the file itself"),
    (b"{", "JSON, perhaps a server's error message: use the address of the file itself"),
    (b"[", "JSON, perhaps a server's error message: use the address of the file itself"),
)


class NotSafetensorsError(Exception):
    """The message says what the file is instead, to be put after "FIELD: "."""


@dataclass(frozen=True, eq=False)
class SafetensorsHeader:
    metadata: Mapping[str, str]
    """What the file's writer noted."""
    shapes: Mapping[str, tuple[int, ...]]
    """By tensor, as the next two."""
    dtypes: Mapping[str, str]
    """As the format has them: "F16"."""
    offsets: Mapping[str, tuple[int, int]]
    """Where the tensor begins and ends, in bytes of the file."""
    file_bytes: int
    """The size of the whole file."""


def read_header(path: Path) -> SafetensorsHeader:
    """
    Raises:
        NotSafetensorsError: it is another file, or is cut off or damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        end = header_end(file.read(PROBE_BYTES), size)
        file.seek(0)
        return parse_header(file.read(end), size)


def header_end(start: bytes, file_bytes: int | None = None) -> int:
    """Where the header ends, in bytes of the file.

    Args:
        start: the file's first bytes, `PROBE_BYTES` of them or the whole file.
        file_bytes: the file's size, if it is known.

    Raises:
        NotSafetensorsError: no such file begins so.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
        raise NotSafetensorsError(_what_it_is(start))
    end = LENGTH_BYTES + length
    if file_bytes is not None and end > file_bytes:
        raise NotSafetensorsError(
            f"cut off: it has {file_bytes} bytes, and its header alone {end}; send the whole file"
        )
    return end


def parse_header(start: bytes, file_bytes: int | None = None) -> SafetensorsHeader:
    """
    Args:
        start: the file's first bytes, as many as `header_end` tells.
        file_bytes: the file's size, if it is known.

    Raises:
        NotSafetensorsError: the header is damaged, or not that of a file of this size.
    """
    try:
        entries = json.loads(start[LENGTH_BYTES:])
    except (ValueError, RecursionError):
        raise NotSafetensorsError(_damaged("its header is no JSON")) from None
    metadata = entries.pop(METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(it, str) for it in metadata.values())):
        raise NotSafetensorsError(_damaged("its metadata are not texts"))
    shapes, dtypes, offsets = {}, {}, {}
    for name, entry in entries.items():
        dtypes[name], shapes[name], (begin, end) = _checked(entry)
        offsets[name] = (len(start) + begin, len(start) + end)
    at = len(start)
    for begin, end in sorted(offsets.values()):
        if begin != at:
            raise NotSafetensorsError(_damaged("its tensors overlap, or have gaps between them"))
        at = end
    if file_bytes is not None and file_bytes < at:
        raise NotSafetensorsError(
            f"cut off: it has {file_bytes} of {at} bytes; send the whole file"
        )
    if file_bytes is not None and file_bytes > at:
        raise NotSafetensorsError(_damaged(f"{file_bytes - at} bytes follow its last tensor"))
    return SafetensorsHeader(metadata, shapes, dtypes, offsets, at)


def _checked(entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """A tensor's dtype, shape and place in the data."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_well = (
            isinstance(shape, list)
            and len(shape) <= MAX_DIMENSIONS
            and all(type(number) is int and 0 <= number < 2**63 for number in [*shape, begin, end])
        )
    except (TypeError, KeyError, ValueError):
        is_well = False
    if not is_well:
        raise NotSafetensorsError(_damaged("its header describes a tensor wrongly"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise NotSafetensorsError("of a number format that this worker does not know")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise NotSafetensorsError(_damaged("a tensor's size is not that of its shape"))
    return dtype, tuple(shape), (begin, end)


def _damaged(why: str) -> str:
    return f"damaged, or not a safetensors file: {why}; send the file as it was made"


def _what_it_is(start: bytes) -> str:
    if not start:
        return "empty"
    if start.startswith(b"PK\x03\x04") and b"data.pkl" in start:
        return PICKLE
    for mark, what in STARTS:
        if start.startswith(mark):
            return what
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, what in TEXTS:
        if text.startswith(mark):
            return what
    return _damaged("its header's length is wrong")
