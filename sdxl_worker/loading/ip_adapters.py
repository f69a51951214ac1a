"""The IP-Adapters of `IP_ADAPTER_DIR`, and the encoders of their pictures."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

from sdxl_worker.errors import RequestError
from sdxl_worker.placement import Placement


@dataclass(frozen=True)
class ImageEncoderFiles:
    """`CompanionFiles` of the encoder of an IP-Adapter's pictures."""

    folder: Path

    @property
    def key(self) -> Hashable:
        return self.folder

    @property
    def title(self) -> str:
        return "the image encoder"

    def size_bytes(self, dtype: torch.dtype) -> int:
        raise NotImplementedError

    def load(self, placement: Placement) -> torch.nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class IpAdapterFiles:
    """`CompanionFiles` of an IP-Adapter."""

    path: Path
    encoder: ImageEncoderFiles

    @property
    def key(self) -> Hashable:
        return self.path

    @property
    def title(self) -> str:
        return f"the IP-Adapter {self.path.stem}"

    def size_bytes(self, dtype: torch.dtype) -> int:
        raise NotImplementedError

    def load(self, placement: Placement) -> torch.nn.Module:
        raise NotImplementedError


def find_ip_adapter(kind: str, folder: Path | None, field: str) -> IpAdapterFiles:
    """
    Args:
        kind: as `ImagePromptField.type`.
        folder: `IP_ADAPTER_DIR`.
        field: of the request, for messages.

    Raises:
        RequestError: there is none of this kind; the message tells which there are.
    """
    raise RequestError(f"{field}: this worker has no IP-Adapter")
