"""Safetensors in fp32 become one file in fp16, so that no layer of an image is twice as large.

Tensor by tensor: the largest network has 10 GB in fp32. The safetensors library writes only files
that are in memory as a whole, so header and data are written here, in the format it documents.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from builder.download_weights import DownloadError

WIDE: dict[str, type[np.floating[Any]]] = {"F32": np.float32, "F64": np.float64}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a file (dtype, shape, data_offsets), and where their data begins, in bytes.

    Raises:
        DownloadError: it is not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(text)
    except ValueError:
        raise DownloadError(f"{path.name} is no safetensors file, the only kind taken") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def store_as_fp16(sources: Sequence[Path], target: Path) -> None:
    """Make one file of all `sources`, F32 and F64 as F16, and remove them.

    Raises:
        DownloadError: a source is not a safetensors file, or a number is too large for fp16.
    """
    headers = [read_header(source) for source in sources]
    wide = any(entry["dtype"] in WIDE for tensors, _ in headers for entry in tensors.values())
    if len(sources) == 1 and not wide:
        sources[0].rename(target)
        return

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensors, _ in headers:
        for name, entry in tensors.items():
            begin, size = end, entry["data_offsets"][1] - entry["data_offsets"][0]
            if entry["dtype"] in WIDE:
                size = size // np.dtype(WIDE[entry["dtype"]]).itemsize * 2
                entry = {**entry, "dtype": "F16"}
            end = begin + size
            header[name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8

    unfinished = target.with_name(target.name + ".unfinished")
    with unfinished.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for source, (tensors, start) in zip(sources, headers, strict=True):
            with source.open("rb") as file:
                for name, entry in tensors.items():
                    begin, stop = entry["data_offsets"]
                    file.seek(start + begin)
                    data = file.read(stop - begin)
                    if entry["dtype"] in WIDE:
                        data = _halved(data, WIDE[entry["dtype"]], f"{source.name}, {name}")
                    output.write(data)
    unfinished.replace(target)
    for source in sources:
        if source != target:
            source.unlink()


def _halved(data: bytes, dtype: type[np.floating[Any]], what: str) -> bytes:
    numbers = np.frombuffer(data, dtype)
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(numbers).any():
        raise DownloadError(f"{what}: has numbers too large for fp16, which this worker serves")
    return half.tobytes()
