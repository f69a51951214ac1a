"""A worker as one would write it first, for `coldstart.py` to compare with: everything imported,
both pipelines loaded whole, one after the other, and the same first picture drawn before the start.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.modules["torchao"] = None  # type: ignore[assignment]  # not one of its requirements

import runpod
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

MODEL_DIR = Path(os.environ.get("MODEL_DIR") or "models/shapes")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

base = StableDiffusionXLPipeline.from_pretrained(
    MODEL_DIR / "base",
    variant="fp16",
    dtype=torch.float16 if DEVICE == "cuda" else torch.float32,
).to(DEVICE)
refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
    MODEL_DIR / "refiner",
    text_encoder=None,
    tokenizer=None,
    text_encoder_2=base.text_encoder_2,
    tokenizer_2=base.tokenizer_2,
    vae=base.vae,
    variant="fp16",
    dtype=torch.float16 if DEVICE == "cuda" else torch.float32,
).to(DEVICE)
for pipeline in (base, refiner):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)


def draw(prompt: str, *, size_px: int | None, steps: int, strength: float) -> Any:
    latents = base(
        prompt,
        height=size_px,
        width=size_px,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    ).images
    return refiner(prompt, image=latents, strength=strength, guidance_scale=7.5).images


def handler(job: dict[str, Any]) -> dict[str, Any]:
    draw(job["input"]["prompt"], size_px=None, steps=25, strength=0.3)
    return {"images": []}


if __name__ == "__main__":
    draw("a red circle", size_px=None if DEVICE == "cuda" else 64, steps=2, strength=0.02)
    runpod.serverless.start({"handler": handler})
