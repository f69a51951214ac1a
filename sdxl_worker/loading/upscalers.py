"""The upscalers of `UPSCALER_DIR`."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

from sdxl_worker.errors import RequestError
from sdxl_worker.placement import Placement


@dataclass(frozen=True)
class UpscalerFiles:
    """`CompanionFiles` of an upscaler."""

    path: Path

    @property
    def key(self) -> Hashable:
        return self.path

    @property
    def title(self) -> str:
        return f"the upscaler {self.path.name}"

    def size_bytes(self, dtype: torch.dtype) -> int:
        raise NotImplementedError

    def load(self, placement: Placement) -> torch.nn.Module:
        raise NotImplementedError


def find_upscaler(name: str, folder: Path | None, field: str) -> UpscalerFiles | None:
    """
    Args:
        name: "lanczos", or a file name, whose ending may be left out.
        folder: `UPSCALER_DIR`.
        field: of the request, for messages.

    Returns:
        None for "lanczos", which needs no file.

    Raises:
        RequestError: there is no such upscaler; the message tells which there are.
    """
    if name == "lanczos":
        return None
    raise RequestError(f"{field}: this worker has no upscaler {name}")
