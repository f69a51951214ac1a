"""Latents become pictures, and what is no picture is noticed.

A network that overflows gives numbers that are not finite, which become a black picture: in 8 bits
nothing tells it from a picture of nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from sdxl_worker.drawing import second_tries
from sdxl_worker.drawing.batches import Plan, decoder_dtype
from sdxl_worker.drawing.encoding import own_scale
from sdxl_worker.errors import let_go
from sdxl_worker.gpu import free_memory, is_out_of_memory


def decode(latents: torch.Tensor, vae: Any, *, may_be_black: bool) -> list[Image.Image] | None:
    """Within `decoding_as_planned`. Where the decoder fails, it is asked again: in tiles where its
    memory did not do, in float32 where no picture came out.

    Args:
        latents: as the last stage leaves them, [n, 4, height / 8, width / 8].
        may_be_black: whether a picture without any light may be what was asked for.

    Returns:
        n RGB pictures, or None: there are none in these latents.
    """
    try:
        pixels, is_sound = _to_pixels(_decoded(latents, vae), may_be_black=may_be_black)
    except RuntimeError as error:
        if vae.use_tiling or not is_out_of_memory(error):
            raise
        let_go(error)
        free_memory()
        second_tries.note("decoded in tiles")
        vae.use_slicing = vae.use_tiling = True
        pixels, is_sound = _to_pixels(_decoded(latents, vae), may_be_black=may_be_black)
    dtype = vae.dtype
    if not is_sound and decoder_dtype(vae) != torch.float32 and latents.isfinite().all():
        second_tries.note("decoded in float32")
        vae.to(dtype=torch.float32)
        # A compiled decoder would be compiled once more, which takes longer than any picture.
        with torch.compiler.set_stance("force_eager"):
            images = _decoded(latents, vae)
        pixels, is_sound = _to_pixels(images, may_be_black=may_be_black)
        vae.to(dtype=dtype)
    return [Image.fromarray(array) for array in pixels] if is_sound else None


@contextlib.contextmanager
def decoding_as_planned(vae: Any, plan: Plan) -> Iterator[None]:
    """Around what decodes or encodes. Afterwards the VAE is as it was, even if that fails.

    diffusers sets a VAE with `force_upcast` to float32 to encode and, if that fails, leaves it so.
    """
    dtype, slicing, tiling = vae.dtype, vae.use_slicing, vae.use_tiling
    vae.use_slicing, vae.use_tiling = plan.slicing, plan.tiling
    try:
        yield
    except BaseException as error:
        let_go(error)  # or there may be no memory left to convert the VAE back
        raise
    finally:
        vae.use_slicing, vae.use_tiling = slicing, tiling
        vae.to(dtype=dtype)


def _decoded(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """As diffusers' pipelines decode: RGB from -1 to 1 and beyond, [n, 3, height, width]."""
    config, dtype = vae.config, vae.dtype
    vae.to(dtype=decoder_dtype(vae))
    latents = latents.to(vae.dtype)
    if own := own_scale(config, latents):
        mean, std = own
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
    images = vae.decode(latents, return_dict=False)[0]
    vae.to(dtype=dtype)
    return images


def _to_pixels(images: torch.Tensor, *, may_be_black: bool) -> tuple[Any, bool]:
    """Rounded to 8 bits on their device, so that only a quarter of the bytes leaves the GPU.

    Returns:
        An array [n, height, width, 3], and whether each of these is a picture. That is told on the
        device too, and read behind the pixels: nothing waits for it.
    """
    finite = images.isfinite().all()
    images = (images * 0.5 + 0.5).clamp(0, 1)
    pixels = images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    lit = pixels.flatten(1).amax(1).min() > 0
    is_sound = finite if may_be_black else finite & lit
    return pixels.cpu().numpy(), bool(is_sound)
