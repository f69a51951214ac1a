"""The ControlNets of `CONTROLNET_DIR`: which of them serves a type, and how it is loaded."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

from sdxl_worker.errors import RequestError
from sdxl_worker.placement import Placement
from sdxl_worker.request import ControlName


@dataclass(frozen=True)
class ControlNetFiles:
    """`CompanionFiles` of a ControlNet."""

    folder: Path
    mode: int | None
    """Of the type that was asked for, in a union; None: it is no union."""

    @property
    def key(self) -> Hashable:
        return self.folder

    @property
    def title(self) -> str:
        return f"the ControlNet {self.folder.name}"

    def size_bytes(self, dtype: torch.dtype) -> int:
        raise NotImplementedError

    def load(self, placement: Placement) -> torch.nn.Module:
        raise NotImplementedError


def find_controlnet(kind: ControlName, folder: Path | None, field: str) -> ControlNetFiles:
    """
    Args:
        folder: `CONTROLNET_DIR`.
        field: of the request, for messages.

    Raises:
        RequestError: there is none for this type; the message tells for which there is one.
    """
    raise RequestError(f"{field}: this worker has no ControlNet")
