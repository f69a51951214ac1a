"""An input picture becomes latents: encoded once for a job, and drawn from once for each picture.

The pipelines would encode it again for each picture. What they make of it is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from sdxl_worker.drawing import second_tries
from sdxl_worker.drawing.batches import decoder_dtype
from sdxl_worker.inputs.canvas import Canvas


@dataclass(frozen=True)
class EncodedCanvas:
    """What is drawn on, as the networks see it; h and w are an eighth of its height and width."""

    latents_shape: tuple[int, int, int]
    """[4, h, w]."""
    picture: DiagonalGaussianDistribution | None
    """Of latents [1, 4, h, w], before they are scaled. None: nothing is there yet."""
    repainted: torch.Tensor | None
    """[1, 1, h, w]: whether anything is repainted in these 8 x 8 pixels. None: all of it."""
    surroundings: DiagonalGaussianDistribution | None
    """The picture with grey where it is repainted, for UNets that take a mask."""


def encode_canvas(
    canvas: Canvas | None,
    size_px: tuple[int, int],
    vae: Any,
    device: torch.device,
    *,
    sees_mask: bool,
) -> EncodedCanvas:
    """Within `decoding_as_planned`.

    Args:
        canvas: None: nothing is there yet.
        size_px: width and height.
        device: where the VAE works. Networks that take turns may be elsewhere before.
        sees_mask: whether the UNet was trained for inpainting, and wants the surroundings.
    """
    width_px, height_px = size_px
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = height_px // factor, width_px // factor
    pixels: np.ndarray = np.zeros((height_px, width_px, 3), np.float32)
    picture = repainted = surroundings = None
    hidden = np.ones((height_px, width_px), bool)
    if canvas is not None:
        pixels = _pixels(canvas.working)
        picture = _encoded(pixels, vae, device)
        if canvas.mask is not None:
            hidden = canvas.mask
            # diffusers looks at one pixel in 64, and so loses a line of 6.
            cells = hidden.reshape(height, factor, width, factor).any((1, 3))
            repainted = torch.from_numpy(cells)[None, None].to(device)
    if sees_mask:
        around = np.where(hidden[..., None], np.float32(0), pixels)
        surroundings = _encoded(around, vae, device)
    return EncodedCanvas(
        (vae.config.latent_channels, height, width), picture, repainted, surroundings
    )


def encode_picture(
    picture: Image.Image, vae: Any, device: torch.device
) -> DiagonalGaussianDistribution:
    """Of latents [1, 4, h, w], before they are scaled. Within `decoding_as_planned`.

    Args:
        picture: RGB.
    """
    return _encoded(_pixels(picture), vae, device)


def latents_of(
    distribution: DiagonalGaussianDistribution, generators: Sequence[torch.Generator], vae: Any
) -> torch.Tensor:
    """Latents of it for each picture, drawn from its generator, [pictures, 4, h, w]."""
    drawn = [distribution.sample(generator) for generator in generators]
    latents = torch.cat(drawn).to(vae.dtype)
    config = vae.config
    if own := own_scale(config, latents):
        mean, std = own
        return (latents - mean) * config.scaling_factor / std
    return config.scaling_factor * latents


def own_scale(config: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation of a VAE's latents by channel, where its configuration has them,
    as that of Playground 2.5; ready to be used with `latents`."""
    if not (getattr(config, "latents_mean", None) and getattr(config, "latents_std", None)):
        return None
    mean, std = (
        torch.tensor(numbers).view(1, -1, 1, 1).to(latents.device, latents.dtype)
        for numbers in (config.latents_mean, config.latents_std)
    )
    return mean, std


def _pixels(picture: Image.Image) -> np.ndarray:
    """From -1 to 1, [height, width, 3]."""
    return 2 * (np.asarray(picture, np.float32) / 255) - 1


def _encoded(pixels: np.ndarray, vae: Any, device: torch.device) -> DiagonalGaussianDistribution:
    """
    Args:
        pixels: from -1 to 1, [height, width, 3].
    """
    dtype = vae.dtype
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device, dtype)
    image = image.to(memory_format=torch.channels_last)  # as the pipelines order it
    distribution = _pass(image, vae, decoder_dtype(vae))
    if decoder_dtype(vae) != torch.float32 and not distribution.parameters.isfinite().all():
        second_tries.note("encoded in float32")
        distribution = _pass(image, vae, torch.float32)
    vae.to(dtype=dtype)
    return distribution


def _pass(image: torch.Tensor, vae: Any, dtype: torch.dtype) -> DiagonalGaussianDistribution:
    vae.to(dtype=dtype)
    return vae.encode(image.to(dtype)).latent_dist
