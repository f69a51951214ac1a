"""What fits the card: the weights, and how many pictures at once.

The bytes per pixel are the peak of live tensors in one pass of the published networks, counted on
tensors without memory: `python -m benchmarks.memory`.
"""

import logging
from dataclasses import dataclass

import torch

from sdxl_worker import cuda_graphs

log = logging.getLogger(__name__)

# What a 1024 x 1024 picture may need beside the weights: activations of the UNet and the decoder,
# CUDA's own context and libraries. On the safe side; it was not measured.
WORKING_MEMORY_BYTES = 5 * 1024**3
# Of one picture with guidance, in 16-bit numbers; the refiner needs more than the base.
UNET_BYTES_PER_PIXEL = 379
DECODER_BYTES_PER_PIXEL = 1536
# What CUDA's libraries take to work in, and what is lost between blocks of memory. An estimate.
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


def fits(weights_bytes: int, free_bytes: int) -> bool:
    """Whether all weights can stay on the card and leave room for a picture to be made."""
    return weights_bytes + WORKING_MEMORY_BYTES <= free_bytes


def plan(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_images: int,
    pixels: int,
    decoder_dtype: torch.dtype,
    moved_in_bytes: int = 0,
) -> Plan:
    """The largest batch that fits, and the decoder's lesser ways only where the full one does not.

    Args:
        pixels: of one picture.
        decoder_dtype: what the decoder computes in.
        moved_in_bytes: weights of a UNet that comes from the host for its stage and leaves after.
    """
    free_bytes = _free_bytes(device)
    if free_bytes is None:
        return Plan(num_images, slicing=False, tiling=False)
    unet_bytes = pixels * UNET_BYTES_PER_PIXEL * dtype.itemsize // 2
    decoder_bytes = pixels * DECODER_BYTES_PER_PIXEL * decoder_dtype.itemsize // 2
    room = free_bytes - MARGIN_BYTES
    recorded_bytes = cuda_graphs.idle_bytes()
    if recorded_bytes:
        # A recording keeps its memory, which grows to what the largest of them needs.
        room_for_unet = room + recorded_bytes - decoder_bytes
    else:
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


def _free_bytes(device: torch.device) -> int | None:
    """What new tensors can have: what CUDA has left, and what torch holds for reuse."""
    if device.type != "cuda":
        return None
    reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + reusable - cuda_graphs.idle_bytes()
