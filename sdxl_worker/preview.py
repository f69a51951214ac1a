"""Small pictures of unfinished ones: latents become RGB by a linear map, without the decoder."""

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

MAX_PREVIEW_SIDE_PX = 256
MAX_PREVIEW_BYTES = 20_000


@dataclass(frozen=True)
class PreviewMap:
    """RGB = latents @ weight + bias, on the scale -1 to 1; weight [channels, 3], bias [3]."""

    weight: torch.Tensor
    bias: torch.Tensor


@torch.no_grad()
def fit_preview_map(vae: Any, device: torch.device) -> PreviewMap:
    """Fit the map to a decoder: least squares over one decoded field of smooth random latents.

    It suits the VAE that is loaded, whichever that is. Smooth, because what the decoder makes of
    noise is texture, and a preview is about areas.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = torch.randn((1, vae.config.latent_channels, 8, 8), generator=generator)
    latents = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)

    # fp16 overflows in a decoder that asks to be upcast.
    dtype = vae.dtype
    if vae.config.force_upcast and dtype == torch.float16:
        vae.to(dtype=torch.float32)
    scaled = (latents / vae.config.scaling_factor).to(device, vae.dtype)
    rgb = vae.decode(scaled, return_dict=False)[0].float().cpu().clamp(-1, 1)
    vae.to(dtype=dtype)

    targets = torch.nn.functional.avg_pool2d(rgb, factor).flatten(2)[0].T
    inputs = latents.flatten(2)[0].T
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, targets).solution
    return PreviewMap(weight=solution[:-1], bias=solution[-1])


def preview_jpeg(latents: torch.Tensor, preview_map: PreviewMap) -> bytes:
    """A JPEG of the first picture of a batch of latents [n, channels, h, w], at most 20 kB."""
    first = latents[0].float().cpu()
    rgb = torch.einsum("chw,cr->hwr", first, preview_map.weight) + preview_map.bias
    pixels = ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((MAX_PREVIEW_SIDE_PX, MAX_PREVIEW_SIDE_PX))
    for quality in (85, 70, 50, 30, 10):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= MAX_PREVIEW_BYTES:
            break
    return buffer.getvalue()
