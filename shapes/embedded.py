"""The shipped base, as plain diffusers loads it, for what is trained on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from shapes import architecture, captions
from shapes.captions import Meaning
from shapes.data import Scene
from shapes.export import VARIANT
from shapes.text_training import TextModels

WHOLE_SHARE = 0.80
PARTIAL_SHARE = 0.10
"""Of the captions; the rest is unconditional."""
ENCODED_AT_ONCE = 50


def load(model: Path) -> StableDiffusionXLPipeline:
    """The base of `model` in fp32, frozen."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        model / "base", variant=VARIANT, dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.eval().requires_grad_(False)
    return pipeline


def text_models(pipeline: StableDiffusionXLPipeline) -> TextModels:
    """Its tokenizers and encoders."""
    return TextModels(
        pipeline.tokenizer, pipeline.tokenizer_2, pipeline.text_encoder, pipeline.text_encoder_2
    )


def draw_caption(scene: Scene, rng: np.random.Generator) -> str | None:
    """A caption that describes the scene, wholly or in part; None for no conditioning at all."""
    draw = rng.random()
    if draw < WHOLE_SHARE:
        return captions.caption(Meaning(scene.shape, scene.color, scene.background), rng)
    if draw < WHOLE_SHARE + PARTIAL_SHARE:
        return captions.caption(captions.partial_meaning(scene, rng), rng)
    return None


def conditioning(models: TextModels, prompts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """States (n, 77, 112) and pooled (n, 64); zeros where the prompt is None."""
    states, pooled = models.conditioning([models.ids(prompt or "") for prompt in prompts])
    said = torch.tensor([prompt is not None for prompt in prompts]).float()
    return states * said[:, None, None], pooled * said[:, None]


def time_ids(count: int, side_px: int = architecture.NATIVE_PX) -> Tensor:
    """SDXL's size conditioning of whole square pictures, (n, 6)."""
    return torch.tensor([[side_px, side_px, 0, 0, side_px, side_px]]).repeat(count, 1).float()


@torch.no_grad()
def encode(pipeline: StableDiffusionXLPipeline, pictures: np.ndarray) -> Tensor:
    """Scaled latents (n, 4, height / 8, width / 8) of uint8 pictures (n, height, width, 3)."""
    parts = []
    for start in range(0, len(pictures), ENCODED_AT_ONCE):
        part = torch.from_numpy(pictures[start : start + ENCODED_AT_ONCE])
        scaled = part.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        parts.append(pipeline.vae.encode(scaled).latent_dist.mode())
    return torch.cat(parts) * architecture.SCALING_FACTOR
