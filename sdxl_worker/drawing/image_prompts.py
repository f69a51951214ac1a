"""IP-Adapters: the UNet attends to a reference picture as it does to the prompt.

What attends is diffusers' `IPAdapterAttnProcessor2_0`. How it gets there is not `load_ip_adapter`:
that is for weights which stay; it moves the whole UNet, and does not give back what it found.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from transformers import CLIPImageProcessorPil

from sdxl_worker.inputs.masks import Mask
from sdxl_worker.loading.companions import at_work
from sdxl_worker.loading.ip_adapters import IpAdapter
from sdxl_worker.placement import Placement

# The processor scales the whole picture before it cuts: 4096 x 1 pixels took 2 GB and 6 s. What is
# cut off before is more than a square away from what is seen.
_MOST_ASPECT_RATIO = 4


@dataclass(frozen=True)
class ImagePrompt:
    """One entry of `ip_adapter`, ready to be drawn with."""

    adapter: IpAdapter
    tokens: torch.Tensor
    """[2, 1, tokens, width]: what the UNet attends to, for the negative prompt and the prompt."""
    kind: str
    """As `ImagePromptField.type`."""
    scale: float
    mask: Mask | None = None
    """As in `References.image_prompt_masks`."""


@torch.no_grad()
def tokens_of_picture(
    picture: Image.Image, encoder: Any, adapter: IpAdapter, placement: Placement
) -> torch.Tensor:
    """`ImagePrompt.tokens` of an RGB picture. Its middle square is seen."""
    side = encoder.config.image_size
    processor = CLIPImageProcessorPil(size=side, crop_size=side)
    pixels = processor(_middle(picture), return_tensors="pt").pixel_values
    pixels = pixels.to(placement.device, placement.dtype)
    with at_work(encoder, placement):
        if adapter.form.sees_patches:
            # One after the other, as in diffusers: together they would be rounded otherwise.
            negative, positive = (
                encoder(one, output_hidden_states=True).hidden_states[-2]
                for one in (torch.zeros_like(pixels), pixels)
            )
        else:
            positive = encoder(pixels).image_embeds
            negative = torch.zeros_like(positive)
    with at_work(adapter, placement):
        return adapter.projection(torch.cat([negative, positive]))[:, None]


def _middle(picture: Image.Image) -> Image.Image:
    """Of a strip, the part around its middle square."""
    most = _MOST_ASPECT_RATIO * min(picture.size)
    if max(picture.size) <= most:
        return picture
    left, top = (max(0, side - most) // 2 for side in picture.size)
    return picture.crop((left, top, picture.width - left, picture.height - top))


@contextlib.contextmanager
def with_image_prompts(
    pipeline: Any,
    prompts: Sequence[ImagePrompt],
    placement: Placement,
    *,
    guidance_scale: float,
    latents_size: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Around one stage of the base; gives further arguments of the pipeline. Afterwards its UNet is
    as it was, down to the objects.

    Args:
        guidance_scale: that the pipeline is called with.
        latents_size: height and width of what is drawn.
    """
    if not prompts:
        yield {}
        return
    unet = pipeline.unet
    is_guided = guidance_scale > 1 and unet.config.time_cond_proj_dim is None  # as in diffusers
    with contextlib.ExitStack() as around:
        for adapter in {id(prompt.adapter): prompt.adapter for prompt in prompts}.values():
            around.enter_context(at_work(adapter, placement))
        around.enter_context(_attending(unet, prompts, latents_size))
        yield {
            "ip_adapter_image_embeds": [
                prompt.tokens if is_guided else prompt.tokens[1:] for prompt in prompts
            ]
        }


@contextlib.contextmanager
def _attending(
    unet: Any, prompts: Sequence[ImagePrompt], latents_size: Sequence[int]
) -> Iterator[None]:
    """With other processors in the UNet's cross-attentions. They are no modules of it: LoRAs,
    offloading and what is compiled go by its modules, which stay the same."""
    originals = dict(unet.attn_processors)
    projection, kind = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
    try:
        unet.set_attn_processor(_processors(unet, originals, prompts, latents_size))
        unet.encoder_hid_proj = _as_it_is
        unet.config.encoder_hid_dim_type = "ip_image_proj"
        yield
    finally:
        unet.config.encoder_hid_dim_type = kind
        unet.encoder_hid_proj = projection
        unet.set_attn_processor(originals)


def _as_it_is(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """In the place of the projection, which was done once, not in each step."""
    return tokens


def _processors(
    unet: Any,
    originals: dict[str, Any],
    prompts: Sequence[ImagePrompt],
    latents_size: Sequence[int],
) -> dict[str, Any]:
    """Of all attentions; only those of the cross-attentions are new."""
    masks = [_masks(prompt, unet, latents_size) for prompt in prompts]
    blocks = [_blocks(prompt.kind, unet) for prompt in prompts]
    processors = dict(originals)
    cross = [name for name in originals if name.endswith(".attn2.processor")]
    for i, name in enumerate(cross):
        scales = [
            prompt.scale if name.startswith(block) else 0.0
            for prompt, block in zip(prompts, blocks, strict=True)
        ]
        processors[name] = _Attend([prompt.adapter for prompt in prompts], i, scales, masks)
    return processors


def _blocks(kind: str, unet: Any) -> str:
    """What the names of the attentions begin with that see the picture
    (https://arxiv.org/abs/2404.02733): in SDXL, one block has the style, and one the layout."""
    if kind == "style":
        return "up_blocks.0.attentions.1."
    if kind == "layout":
        last = len(unet.down_blocks[2].attentions) - 1  # 1; smaller models have only the first
        return f"down_blocks.2.attentions.{last}."
    return ""


def _masks(
    prompt: ImagePrompt, unet: Any, latents_size: Sequence[int]
) -> dict[int, torch.Tensor] | None:
    """A prompt's mask at each level of a UNet, [1, 1, n, 1], by n, the level's number of places.

    diffusers makes them anew in each attention, and has to guess height and width from n: where
    they are odd, it may be wrong (5 x 4 for 4 x 5), and shift the mask without a word. It takes
    a column as it is.
    """
    if prompt.mask is None:
        return None
    mask = torch.from_numpy(prompt.mask.astype(np.float32))[None, None]
    height, width = latents_size
    masks = {}
    for _ in unet.config.block_out_channels:
        level = torch.nn.functional.interpolate(mask, size=(height, width), mode="bicubic")
        masks[height * width] = level.reshape(1, 1, -1, 1).to(prompt.tokens)
        height, width = (height + 1) // 2, (width + 1) // 2
    return masks


class _Attend:
    """The processor of one cross-attention."""

    def __init__(
        self,
        adapters: Sequence[IpAdapter],
        number: int,
        scales: list[float],
        masks: Sequence[dict[int, torch.Tensor] | None],
    ) -> None:
        """
        Args:
            number: of the cross-attention, in the adapters.
            scales: of each adapter here.
            masks: of each adapter, as `_masks` gives them.
        """
        width, attended = adapters[0].form.attentions[number]
        with torch.device("meta"):  # it would draw random weights
            self._processor = IPAdapterAttnProcessor2_0(
                width,
                attended,
                num_tokens=[adapter.form.tokens for adapter in adapters],
                scale=scales,
            )
        modules = torch.nn.ModuleList
        self._processor.to_k_ip = modules([adapter.to_k[number] for adapter in adapters])
        self._processor.to_v_ip = modules([adapter.to_v[number] for adapter in adapters])
        self._masks = masks

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        masks = None
        if any(self._masks):
            masks = [one and one[hidden_states.shape[1]] for one in self._masks]
        return self._processor(
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            temb,
            ip_adapter_masks=masks,
        )
