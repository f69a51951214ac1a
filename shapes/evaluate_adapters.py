"""Counts what the trained adapters do, in plain diffusers with the weights merged by
`shapes.merging`: `python -m shapes.evaluate_adapters models/shapes models/adapters --count 200`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from shapes import effects, embedded
from shapes.captions import Meaning, full_prompts
from shapes.judge import CLEAR_IOU, Judgement, judge
from shapes.merging import adapters
from shapes.sheet import contact_sheet

DOT, FRAME, FEW_STEP = "dot.safetensors", "frame.safetensors", "few-step.safetensors"
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "DDIM": DDIMScheduler.from_config,
    "Euler, trailing": lambda config: EulerDiscreteScheduler.from_config(
        config, timestep_spacing="trailing"
    ),
}
SHEET_COLUMNS = 10


def share_right(seen: Sequence[Judgement], meanings: Sequence[Meaning]) -> float:
    """Of pictures that show shape, colour and background as told, with a clear outline."""
    return float(
        np.mean(
            [
                (one.shape, one.color, one.background)
                == (meaning.shape, meaning.color, meaning.background)
                and one.iou >= CLEAR_IOU
                for one, meaning in zip(seen, meanings, strict=True)
            ]
        )
    )


def judge_effects(image: Image.Image, meaning: Meaning, *, dot: bool, frame: bool) -> Judgement:
    """What the picture shows beside its effects.

    A filled ring is a circle, so an dotd picture is judged as it is where a ring is meant.
    """
    inside = effects.without_frame(image) if frame else image
    return judge(effects.filled(inside) if dot and meaning.shape != "ring" else inside)


def effects_line(
    images: Sequence[Image.Image], meanings: Sequence[Meaning], *, dot: bool, frame: bool
) -> str:
    """Share right and the strength of both effects: mean, and share of the pictures over 0.5."""
    seen = [
        judge_effects(image, meaning, dot=dot, frame=frame)
        for image, meaning in zip(images, meanings, strict=True)
    ]
    dotted = [
        effects.dot_strength(effects.without_frame(image) if frame else image)
        for image, meaning in zip(images, meanings, strict=True)
        if meaning.shape != "ring"
    ]
    framed = [effects.frame_strength(image) for image in images]
    return (
        f"right {share_right(seen, meanings):6.1%}  IoU {np.mean([one.iou for one in seen]):.3f}"
        f"  dot {np.mean(dotted):5.2f} ({np.mean(np.array(dotted) > 0.5):6.1%})"
        f"  frame {np.mean(framed):5.2f} ({np.mean(np.array(framed) > 0.5):6.1%})"
    )


def _evaluate_effects(
    pipeline: StableDiffusionXLPipeline, folder: Path, count: int, seed: int
) -> list[Image.Image]:
    prompts, meanings = zip(*full_prompts(count, seed), strict=True)
    sheet: list[Image.Image] = []
    pipeline.scheduler = SCHEDULERS["DDIM"](pipeline.scheduler.config)
    for dot, frame in ((0, 0), (0.5, 0), (1, 0), (0, 0.5), (0, 1), (1, 1)):
        scales = {folder / DOT: float(dot), folder / FRAME: float(frame)}
        with adapters(pipeline, {path: scale for path, scale in scales.items() if scale}):
            images = embedded.draw(pipeline, prompts, seed=seed)
        line = effects_line(images, meanings, dot=bool(dot), frame=bool(frame))
        print(f"dot {dot:<4} frame {frame:<4} {line}", flush=True)
        sheet += images[:SHEET_COLUMNS]
    return sheet


def _evaluate_few_step(
    pipeline: StableDiffusionXLPipeline, folder: Path, count: int, seed: int
) -> list[Image.Image]:
    prompts, meanings = zip(*full_prompts(count, seed), strict=True)
    sheet: list[Image.Image] = []
    config = pipeline.scheduler.config
    for scheduler, steps, guidance_scale, scale in (
        ("DDIM", 25, 7.5, 0.0),
        ("DDIM", 4, 7.5, 0.0),
        ("Euler, trailing", 4, 7.5, 0.0),
        ("Euler, trailing", 4, 1.0, 0.0),
        ("Euler, trailing", 4, 1.0, 1.0),
    ):
        pipeline.scheduler = SCHEDULERS[scheduler](config)
        with adapters(pipeline, {folder / FEW_STEP: scale} if scale else {}):
            images = embedded.draw(
                pipeline, prompts, seed=seed, steps=steps, guidance_scale=guidance_scale
            )
        seen = [judge(image) for image in images]
        print(
            f"{scheduler:16} {steps:2} steps  guidance {guidance_scale}  few-step {scale:.0f}"
            f"  right {share_right(seen, meanings):6.1%}"
            f"  IoU {np.mean([one.iou for one in seen]):.3f}"
            f"  flat distance {np.mean([one.flat_distance for one in seen]):.1f}",
            flush=True,
        )
        sheet += images[:SHEET_COLUMNS]
    return sheet


def main() -> None:
    """Print the figures, and write the first pictures of each line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with base/")
    parser.add_argument("adapters", type=Path, help="folder of the adapters' files")
    parser.add_argument("--only", choices=["effects", "few-step"])
    parser.add_argument("--count", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of prompts and pictures")
    parser.add_argument("--sheet", type=Path, help="write the first pictures to this PNG")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = embedded.load(arguments.model)
    sheet: list[Image.Image] = []
    for name, run in (("effects", _evaluate_effects), ("few-step", _evaluate_few_step)):
        if arguments.only in (None, name):
            sheet += run(pipeline, arguments.adapters, arguments.count, arguments.seed)
    if arguments.sheet:
        contact_sheet(sheet, SHEET_COLUMNS).save(arguments.sheet)


if __name__ == "__main__":
    main()
