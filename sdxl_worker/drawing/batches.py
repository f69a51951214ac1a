"""How many pictures of a job fit the GPU at once, and how they are decoded.

The bytes per pixel are the peak of live tensors in one pass of the published networks, counted on
tensors without memory: `python -m benchmarks.memory`.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_worker.gpu import idle_graph_bytes
from sdxl_worker.loading.models import Models

log = logging.getLogger(__name__)

# For one picture with guidance, in 16-bit numbers: the refiner's, which needs more than the base.
UNET_BYTES_PER_PIXEL = 379
DECODER_BYTES_PER_PIXEL = 1536
# Working memory of CUDA's libraries, and gaps between blocks of memory. An estimate.
MARGIN_BYTES = 1024**3


@dataclass(frozen=True)
class Plan:
    """How the pictures of a job are made."""

    batch_size: int
    """Pictures denoised together."""
    slicing: bool
    """Whether they are decoded one at a time."""
    tiling: bool
    """Whether each is decoded in tiles. Their seams are blended, so pixels change a little."""

    def smaller(self) -> "Plan | None":
        """What to try where the memory did not do; None where there is nothing smaller."""
        if self.batch_size > 1:
            half = self.batch_size // 2
            return Plan(half, slicing=half > 1, tiling=self.tiling)
        return None if self.tiling else Plan(1, slicing=False, tiling=True)


def plan(models: Models, *, num_images: int, pixels: int) -> Plan:
    """The largest batch that fits; slicing and tiling only where decoding does not fit without.

    Args:
        pixels: of one picture.
    """
    free_bytes = _free_bytes(models.device)
    if free_bytes is None:
        return Plan(num_images, slicing=False, tiling=False)
    unet_bytes = pixels * UNET_BYTES_PER_PIXEL * models.dtype.itemsize // 2
    decoder_bytes = pixels * DECODER_BYTES_PER_PIXEL * decoder_dtype(models.vae).itemsize // 2
    room = free_bytes - MARGIN_BYTES
    recorded_bytes = idle_graph_bytes()
    if recorded_bytes:
        # CUDA graphs keep their common memory, which grows to what the largest of them needs.
        room_for_unet = room + recorded_bytes - decoder_bytes
    else:
        # A UNet that is not resident is moved in for its stage, and out before the decoder is.
        moved_in_bytes = 0 if models.placement.resident else _largest_unet_bytes(models)
        room_for_unet = room - moved_in_bytes
    batch_size = max(1, min(num_images, room_for_unet // unet_bytes))
    if recorded_bytes:
        room -= max(0, batch_size * unet_bytes - recorded_bytes)
    chosen = Plan(
        batch_size,
        slicing=batch_size > 1 and batch_size * decoder_bytes > room,
        tiling=decoder_bytes > room,
    )
    if chosen != Plan(num_images, slicing=False, tiling=False):
        log.info("free on the GPU %.1f GB: %s", free_bytes / 1e9, chosen)
    return chosen


def decoder_dtype(vae: Any) -> torch.dtype:
    """As the pipelines choose it: only float16 has too small a range for some decoders."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    return torch.float32 if upcast else vae.dtype


def _largest_unet_bytes(models: Models) -> int:
    return max(unet.get_memory_footprint() for unet in models.unets())


def _free_bytes(device: torch.device) -> int | None:
    """What is free for new tensors: what CUDA has left, and what torch holds for reuse."""
    if device.type != "cuda":
        return None
    reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + reusable - idle_graph_bytes()
