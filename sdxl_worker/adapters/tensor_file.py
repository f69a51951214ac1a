"""Reading single tensors of a safetensors file whose header is known."""

import os
import weakref
from pathlib import Path
from typing import Any

import torch

from sdxl_worker.safetensors_header import SafetensorsHeader

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFile:
    """Stays readable when the file's name is removed. It is closed with this object, or by `close`.

    The safetensors library maps the file into memory, where a volume that fails ends the process;
    here it raises OSError.
    """

    def __init__(self, path: Path, header: SafetensorsHeader) -> None:
        self._header = header
        self._descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._descriptor)

    def read(self, key: str) -> torch.Tensor:
        """A copy of a tensor, of a dtype in `DTYPES`, on the host.

        Raises:
            OSError: the file cannot be read, or not to the tensor's end.
        """
        begin, end = self._header.offsets[key]
        data: Any = torch.empty(end - begin, dtype=torch.uint8)
        buffer, at = data.numpy(), 0
        while at < len(buffer):
            count = os.preadv(self._descriptor, [buffer[at:]], begin + at)
            if count == 0:
                raise OSError("the file ends within a tensor")
            at += count
        return data.view(DTYPES[self._header.dtypes[key]]).view(self._header.shapes[key])
