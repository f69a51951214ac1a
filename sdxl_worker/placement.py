"""Where the networks live, in which number format, and whether all of them fit the GPU at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What a 1024 x 1024 picture may need beside the weights: activations of the UNet and the decoder,
# CUDA's own context and libraries. A cautious estimate, not measured. Counted are 1.6 GB for the
# decoder, which needs the most, and with `batches.MARGIN_BYTES` 2.7 GB. A card of 16 GiB misses it
# by a hair: 11.46 GB of weights and this are 16.83 GB, of 17.18 less what CUDA takes for itself.
WORKING_MEMORY_BYTES = 5 * 1024**3


@dataclass(frozen=True)
class Placement:
    device: torch.device
    dtype: torch.dtype
    resident: bool
    """Whether all networks stay on `device`. Otherwise they wait on the host for their turn."""


def fits(weights_bytes: int, free_bytes: int) -> bool:
    """Whether all weights can stay on the GPU and leave room for a picture to be made."""
    return weights_bytes + WORKING_MEMORY_BYTES <= free_bytes
