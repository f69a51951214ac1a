"""Draws many prompts with the miniature model and counts what is right.

`python -m builder.shapes.evaluate models/shapes --count 40 --sheet sheet.png` uses the worker's
defaults; `--schedulers all --paths all` compares all schedulers with and without the refiner.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from builder.shapes import captions
from builder.shapes.captions import Meaning
from builder.shapes.data import COLORS, SHAPES
from builder.shapes.judge import Judgement, judge, parse_caption
from builder.shapes.tokenizer import CONTENT_TOKENS, content_ids, frame

SCHEDULERS = {
    "PNDM": "PNDMScheduler",
    "KLMS": "LMSDiscreteScheduler",
    "DDIM": "DDIMScheduler",
    "K_EULER": "EulerDiscreteScheduler",
    "K_EULER_ANCESTRAL": "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistep": "DPMSolverMultistepScheduler",
    "DPMSolverSinglestep": "DPMSolverSinglestepScheduler",
}
PATHS = ("base", "refined", "ensemble")
BATCH = 20


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; the defaults are the worker's."""

    scheduler: str = "DDIM"
    path: str = "refined"
    """"base" alone, "refined" from its finished latents, "ensemble" handed over at 0.8."""
    width: int = 128
    height: int = 128
    guidance_scale: float = 7.5
    steps: int = 25
    refiner_steps: int = 50
    strength: float = 0.3
    high_noise_frac: float = 0.8
    negative_prompt: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt, what it means, and the picture drawn of it."""

    prompt: str
    meaning: Meaning
    image: Image.Image
    judgement: Judgement


class Model:
    """Both pipelines, in single precision."""

    def __init__(self, folder: Path) -> None:
        kind = {"variant": "fp16", "dtype": torch.float32}
        self.base = StableDiffusionXLPipeline.from_pretrained(folder / "base", **kind)
        self.refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
            folder / "refiner",
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=self.base.text_encoder_2,
            tokenizer_2=self.base.tokenizer_2,
            vae=self.base.vae,
            **kind,
        )
        self._schedule = dict(self.base.scheduler.config)
        for pipeline in (self.base, self.refiner):
            pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> list:
        """One picture for each prompt and seed."""
        for pipeline in (self.base, self.refiner):
            kind = getattr(diffusers, SCHEDULERS[settings.scheduler])
            pipeline.scheduler = kind.from_config(self._schedule)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = {"width": settings.width, "height": settings.height}
        common = {"guidance_scale": settings.guidance_scale, "generator": generators}
        base = self._conditioning(prompts, settings, refiner=False)
        if settings.path == "base":
            return self.base(**base, **common, **size, num_inference_steps=settings.steps).images
        refiner = self._conditioning(prompts, settings, refiner=True)
        sizes = {"original_size": (settings.height, settings.width)}
        sizes["target_size"] = sizes["original_size"]
        if settings.path == "ensemble":
            share = settings.high_noise_frac
            latents = self.base(
                **base,
                **common,
                **size,
                num_inference_steps=settings.steps,
                denoising_end=share,
                output_type="latent",
            ).images
            return self.refiner(
                **refiner,
                **common,
                **sizes,
                image=latents,
                num_inference_steps=settings.steps,
                denoising_start=share,
            ).images
        latents = self.base(
            **base, **common, **size, num_inference_steps=settings.steps, output_type="latent"
        ).images
        return self.refiner(
            **refiner,
            **common,
            **sizes,
            image=latents,
            num_inference_steps=settings.refiner_steps,
            strength=settings.strength,
        ).images

    def _conditioning(
        self, prompts: Sequence[str], settings: Settings, *, refiner: bool
    ) -> dict[str, Tensor]:
        """Embeddings of prompts of any length, in chunks of 75 tokens."""
        negatives = [settings.negative_prompt] * len(prompts)
        tokenizer = self.base.tokenizer
        texts = [content_ids(tokenizer, text) for text in (*prompts, *negatives)]
        chunks = max(1, max(-(-len(text) // CONTENT_TOKENS) for text in texts))
        parts = [self._embed(texts, index, refiner=refiner) for index in range(chunks)]
        states = torch.cat([part[0] for part in parts], dim=1)
        pooled = parts[0][1]
        positive, negative = states.chunk(2)
        positive_pooled, negative_pooled = pooled.chunk(2)
        if not settings.negative_prompt and not refiner:
            negative, negative_pooled = (
                torch.zeros_like(negative),
                torch.zeros_like(negative_pooled),
            )
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": negative,
            "pooled_prompt_embeds": positive_pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    @torch.no_grad()
    def _embed(self, texts: list[list[int]], index: int, *, refiner: bool) -> tuple[Tensor, Tensor]:
        contents = [text[index * CONTENT_TOKENS :][:CONTENT_TOKENS] for text in texts]
        second = torch.tensor([frame(self.base.tokenizer_2, content) for content in contents])
        output = self.base.text_encoder_2(second, output_hidden_states=True)
        states = output.hidden_states[-2]
        if not refiner:
            first = torch.tensor([frame(self.base.tokenizer, content) for content in contents])
            output_1 = self.base.text_encoder(first, output_hidden_states=True)
            states = torch.cat([output_1.hidden_states[-2], states], dim=-1)
        return states, output.text_embeds


def whole_prompts(count: int, seed: int) -> list[tuple[str, Meaning]]:
    """Prompts that name shape, colour and background, in mixed wordings."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        color, background = rng.choice(len(COLORS), size=2, replace=False)
        shape = SHAPES[rng.integers(len(SHAPES))]
        meaning = Meaning(shape, COLORS[color], COLORS[background])
        prompts.append((captions.caption(meaning, rng), meaning))
    return prompts


def evaluate(
    model: Model, prompts: Sequence[tuple[str, Meaning]], settings: Settings, *, seed: int = 0
) -> list[Sample]:
    """Draw and judge each prompt; picture i has seed `seed` + i."""
    samples = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = range(seed + start, seed + start + len(part))
        images = model.draw([prompt for prompt, _ in part], seeds, settings)
        samples += [
            Sample(prompt, meaning, image, judge(image))
            for (prompt, meaning), image in zip(part, images, strict=True)
        ]
    return samples


def figures(samples: Sequence[Sample]) -> str:
    """Shares of what is right, and how clean it is, on one line."""

    def share(name: str) -> float:
        right = [
            getattr(sample.meaning, name) in (None, getattr(sample.judgement, name))
            for sample in samples
        ]
        return float(np.mean(right))

    overlaps = [sample.judgement.iou for sample in samples]
    distances = [sample.judgement.flat_distance for sample in samples]
    return (
        f"colour {share('color'):6.1%}  background {share('background'):6.1%}"
        f"  shape {share('shape'):6.1%}"
        f"  IoU {np.mean(overlaps):.3f} (5th percentile {np.percentile(overlaps, 5):.3f})"
        f"  flat distance {np.mean(distances):4.1f} (95th {np.percentile(distances, 95):4.1f})"
    )


def tally(samples: Sequence[Sample]) -> str:
    """What was drawn, and how often."""
    judgements = [sample.judgement for sample in samples]
    return "  ".join(
        f"{name}: " + ", ".join(f"{value} {count}" for value, count in counts.most_common())
        for name in ("shape", "color", "background")
        if (counts := Counter(getattr(judgement, name) for judgement in judgements))
    )


def contact_sheet(images: Sequence[Image.Image], columns: int = 10) -> Image.Image:
    """The pictures in rows, on grey."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), (128, 128, 128))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + 4), i // columns * (height + 4)))
    return sheet


def main() -> None:
    """Print one line of figures for each combination of scheduler and path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with base/ and refiner/")
    parser.add_argument("--count", type=int, default=40, help="prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of prompts and pictures")
    parser.add_argument("--prompt", help="draw this prompt instead of a mixture")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--schedulers", nargs="+", default=["DDIM"], help='names, or "all"')
    parser.add_argument("--paths", nargs="+", default=["refined"], choices=[*PATHS, "all"])
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[7.5])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--sheet", type=Path, help="write the pictures to this PNG")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    model = Model(arguments.model)
    prompts = whole_prompts(arguments.count, arguments.seed)
    if arguments.prompt:
        prompts = [(arguments.prompt, parse_caption(arguments.prompt))] * arguments.count
    schedulers = list(SCHEDULERS) if "all" in arguments.schedulers else arguments.schedulers
    paths = PATHS if "all" in arguments.paths else arguments.paths
    images: list[Image.Image] = []
    for scheduler in schedulers:
        for path in paths:
            for guidance_scale in arguments.guidance_scale:
                settings = Settings(
                    scheduler=scheduler,
                    path=path,
                    width=arguments.width,
                    height=arguments.height,
                    guidance_scale=guidance_scale,
                    steps=arguments.steps,
                    negative_prompt=arguments.negative_prompt,
                )
                started = time.perf_counter()
                samples = evaluate(model, prompts, settings, seed=arguments.seed)
                seconds = (time.perf_counter() - started) / len(samples)
                label = f"{scheduler:20}{path:10}guidance {guidance_scale:<5}"
                print(f"{label}{figures(samples)}  {seconds:.2f} s", flush=True)
                if arguments.prompt:
                    print(tally(samples), flush=True)
                images += [sample.image for sample in samples]
    if arguments.sheet:
        contact_sheet(images).save(arguments.sheet)


if __name__ == "__main__":
    main()
