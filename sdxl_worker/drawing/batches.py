"""How many pictures of a job fit the GPU at once, and how they are decoded.

The bytes per pixel are the peak of live tensors in one pass of the published networks, counted on
tensors without memory: `python -m benchmarks.memory`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sdxl_worker import gpu
from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.image_prompts import ImagePrompt
from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import MIN_SIDE_PX, SIDE_MULTIPLE_PX
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request
from sdxl_worker.speed.cuda_graphs import GraphedForward

log = logging.getLogger(__name__)

# For one picture with guidance, in 16-bit numbers: the refiner's, which needs more than the base.
UNET_BYTES_PER_PIXEL = 379
BASE_UNET_BYTES_PER_PIXEL = 315
# The base's with what ControlNets add to it, which they make before. One that has three pictures,
# or several networks one after the other, need less for themselves.
CONTROLLED_UNET_BYTES_PER_PIXEL = 431
DECODER_BYTES_PER_PIXEL = 1536
ENCODER_BYTES_PER_PIXEL = 1280
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
    encoding_tiled: bool = False
    """Whether the picture that they start from is encoded in tiles."""
    most_at_once: int | None = field(default=None, compare=False)
    """Pictures that one pass of a UNet has memory for, of all jobs; None: not known."""

    def smaller(self) -> "Plan | None":
        """What to try where the memory did not do; None where there is nothing smaller."""
        if self.batch_size > 1:
            half = self.batch_size // 2
            return replace(self, batch_size=half, slicing=half > 1)
        return None if self.tiling else replace(self, slicing=False, tiling=True)


def check_fits(
    models: Models,
    request: Request,
    *,
    width_px: int,
    height_px: int,
    controls: Sequence[Control] = (),
    image_prompts: Sequence[ImagePrompt] = (),
) -> None:
    """Refuse a size of which it is certain, before any work, that it does not fit the GPU.

    Decoding and encoding can be done in tiles, a UNet's pass cannot. Certain is what needs more
    than all that is free, by the smaller UNet's figure; what is in doubt is tried.

    Args:
        width_px: and `height_px`, of one picture as the UNets see it.
        controls: of the base, as `image_prompts`.

    Raises:
        RequestError: with the largest square that fits.
    """
    free_bytes = gpu.free_bytes(models.device)
    if free_bytes is None:
        return
    # For a first picture of another size, recordings are given up.
    free_bytes += gpu.idle_graph_bytes()
    if not models.placement.resident:
        free_bytes -= min(unet.get_memory_footprint() for unet in models.unets())
        free_bytes -= _moved_in_bytes(controls, image_prompts)
    is_guided = request.guidance_scale > 1
    share = models.dtype.itemsize / 2 * (1 if is_guided else 0.5)  # of the figures above
    least = CONTROLLED_UNET_BYTES_PER_PIXEL if controls else BASE_UNET_BYTES_PER_PIXEL
    if width_px * height_px * least * share <= free_bytes:
        return
    room = max(free_bytes - MARGIN_BYTES, free_bytes // 2, 0)
    side = math.isqrt(int(room / (_unet_bytes_per_pixel(controls) * share)))
    side -= side % SIDE_MULTIPLE_PX
    if side >= MIN_SIDE_PX:  # or the size is not what is wrong
        keeps_its_size = request.image_url is not None and request.mode is None
        field = "image_url" if keeps_its_size else "height, width"
        if request.hires and request.hires.scale > 1:
            field = "hires.scale"
        raise RequestError(
            f"{field}: {width_px} x {height_px} "
            "pixels do not fit the memory of this worker's GPU; the largest square that does is "
            f"{side} x {side}"
        )


def plan(
    models: Models,
    *,
    num_images: int,
    pixels: int,
    encodes: bool = False,
    controls: Sequence[Control] = (),
    image_prompts: Sequence[ImagePrompt] = (),
) -> Plan:
    """The largest batch that fits; slicing and tiling only where decoding does not fit without.

    Args:
        pixels: of one picture.
        encodes: whether a picture of that size is encoded, alone, before the rest.
        controls: of the base, as `image_prompts`. Where networks do not take turns, theirs are in
            memory already.
    """
    free_bytes = gpu.free_bytes(models.device)
    if free_bytes is None:
        return Plan(num_images, slicing=False, tiling=False)
    unet_bytes = pixels * _unet_bytes_per_pixel(controls) * models.dtype.itemsize // 2
    vae_itemsize = decoder_dtype(models.vae).itemsize
    decoder_bytes = pixels * DECODER_BYTES_PER_PIXEL * vae_itemsize // 2
    encoder_bytes = pixels * ENCODER_BYTES_PER_PIXEL * vae_itemsize // 2
    room = free_bytes - MARGIN_BYTES
    encoding_tiled = encodes and encoder_bytes > room
    # A pass that is not recorded yet may be in its next step.
    records = any(isinstance(unet.forward, GraphedForward) for unet in models.unets())
    recorded_bytes = gpu.idle_graph_bytes() if records else 0
    if records:
        # CUDA graphs keep their common memory, which grows to what the largest of them needs.
        room_for_unet = room + recorded_bytes - decoder_bytes
    else:
        # A UNet that is not resident is moved in for its stage, and out before the decoder is.
        moved_in_bytes = 0
        if not models.placement.resident:
            moved_in_bytes = _largest_unet_bytes(models)
            moved_in_bytes += _moved_in_bytes(controls, image_prompts)
        room_for_unet = room - moved_in_bytes
    most_at_once = max(1, room_for_unet // unet_bytes)
    batch_size = min(num_images, most_at_once)
    if records:
        room -= max(0, batch_size * unet_bytes - recorded_bytes)
    chosen = Plan(
        batch_size,
        slicing=batch_size > 1 and batch_size * decoder_bytes > room,
        tiling=decoder_bytes > room,
        encoding_tiled=encoding_tiled,
        most_at_once=most_at_once,
    )
    if chosen != Plan(num_images, slicing=False, tiling=False):
        log.info("free on the GPU %.1f GB: %s", free_bytes / 1e9, chosen)
    return chosen


def decoder_dtype(vae: Any) -> torch.dtype:
    """Of a VAE at work, as the pipelines choose it: only float16 has too small a range for some
    decoders. They encode in it, too."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    return torch.float32 if upcast else vae.dtype


def _largest_unet_bytes(models: Models) -> int:
    return max(unet.get_memory_footprint() for unet in models.unets())


def _unet_bytes_per_pixel(controls: Sequence[Control]) -> int:
    return CONTROLLED_UNET_BYTES_PER_PIXEL if controls else UNET_BYTES_PER_PIXEL


def _moved_in_bytes(controls: Sequence[Control], image_prompts: Sequence[ImagePrompt]) -> int:
    """Of the ControlNets and IP-Adapters that come to the device beside the base's UNet."""
    networks = {id(control.network): control.network for control in controls}
    adapters = {id(prompt.adapter): prompt.adapter for prompt in image_prompts}
    return sum(network.get_memory_footprint() for network in networks.values()) + sum(
        tensor.nbytes for adapter in adapters.values() for tensor in adapter.parameters()
    )
