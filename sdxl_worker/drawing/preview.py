"""Small previews of unfinished pictures."""

import io

import torch
from PIL import Image

from sdxl_worker.loading.latent_rgb import LatentRgb

MAX_PREVIEW_SIDE_PX = 256
MAX_PREVIEW_BYTES = 20_000


def preview_jpeg(latents: torch.Tensor, latent_rgb: LatentRgb) -> bytes:
    """A JPEG of the first picture of a batch of latents [n, channels, h, w], at most 20 kB."""
    first = latents[0].float().cpu()
    rgb = torch.einsum("chw,cr->hwr", first, latent_rgb.weight) + latent_rgb.bias
    pixels = ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((MAX_PREVIEW_SIDE_PX, MAX_PREVIEW_SIDE_PX))
    for quality in (85, 70, 50, 30, 10):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= MAX_PREVIEW_BYTES:
            break
    return buffer.getvalue()
