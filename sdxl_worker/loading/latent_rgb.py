"""What colours a model's latents stand for: a linear map to RGB, for previews without a decoder."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LatentRgb:
    """RGB = latents @ weight + bias, on the scale -1 to 1; weight [channels, 3], bias [3]."""

    weight: torch.Tensor
    bias: torch.Tensor


@torch.no_grad()
def fit_latent_rgb(vae: Any, device: torch.device) -> LatentRgb:
    """Fit the map to a decoder: least squares over one decoded field of smooth random latents.

    So it suits whichever VAE is loaded. The latents are smooth because the decoder makes texture of
    noise, and a preview is about areas.
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
    return LatentRgb(weight=solution[:-1], bias=solution[-1])
