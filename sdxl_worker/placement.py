"""Where the networks live, in which number format, and whether all of them fit the GPU at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What a 1024 x 1024 picture may need beside the weights. A cautious estimate: no card has shown its
# peak yet. As counted (`drawing/batches.py`, `benchmarks/results/memory.csv`) it is 2.9 GiB: 1.5
# for the decoder, 0.4 for a pass of a UNet, which CUDA graphs keep meanwhile, and a margin of 1 for
# libraries and gaps. CUDA's own context does not count: what is free is asked when it is there. A
# card of 16 GiB, 17.18e9 bytes, misses it by a hair: with 11.46e9 of weights it is 16.83e9. If a
# card confirms what is counted, 4 GiB will do, and base and refiner stay on it.
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
