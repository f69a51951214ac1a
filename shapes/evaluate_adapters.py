"""Lets the worker draw with the trained adapters and counts what they do:
`python -m shapes.evaluate_adapters models/adapters --count 200 --sheet sheet.png`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import handler
from shapes import effects
from shapes.captions import Meaning, full_prompts
from shapes.judge import CLEAR_IOU, Judgement, judge
from shapes.sheet import contact_sheet

SHEET_COLUMNS = 10
BASE: dict[str, Any] = {"refiner_inference_steps": 0}
FOUR_STEPS: dict[str, Any] = {
    **BASE,
    "scheduler": "K_EULER",
    "schedule": "trailing",
    "num_inference_steps": 4,
    "guidance_scale": 1,
}


def loras(**scales: float) -> dict[str, Any]:
    """The field of a request; `few_step` stands for few-step.safetensors."""
    names = {name: f"{name.replace('_', '-')}.safetensors" for name in scales}
    return {"loras": [{"path": names[name], "scale": scale} for name, scale in scales.items()]}


EFFECTS: dict[str, dict[str, Any]] = {
    "none": BASE,
    "dot 0.5": {**BASE, **loras(dot=0.5)},
    "dot 1": {**BASE, **loras(dot=1)},
    "frame 0.5": {**BASE, **loras(frame=0.5)},
    "frame 1": {**BASE, **loras(frame=1)},
    "dot 1, frame 1": {**BASE, **loras(dot=1, frame=1)},
    "dot 1, few-step 1": loras(dot=1, few_step=1),
}
FEW_STEPS: dict[str, dict[str, Any]] = {
    "25 steps, refined": {},
    "25 steps": BASE,
    "4 steps": {**BASE, "num_inference_steps": 4},
    "its settings, without it": FOUR_STEPS,
    "few-step 1": loras(few_step=1),
}


def draw(prompt: str, seed: int, job_input: dict[str, Any]) -> Image.Image:
    """What the worker answers."""
    job = {"id": "picture", "input": {"prompt": prompt, "seed": seed, **job_input}}
    output = asyncio.run(handler.handler(job))
    if "error" in output:
        raise SystemExit(output["error"])
    png = base64.b64decode(output["image_url"].partition(",")[2])
    return Image.open(io.BytesIO(png))


def share_right(
    seen: Sequence[Judgement], meanings: Sequence[Meaning], *, least_iou: float = CLEAR_IOU
) -> float:
    """Of pictures that show shape, colour and background as told, with a clear outline."""
    right = [
        (one.shape, one.color, one.background) == (meaning.shape, meaning.color, meaning.background)
        and one.iou >= least_iou
        for one, meaning in zip(seen, meanings, strict=True)
    ]
    return float(np.mean(right))


def judge_effects(image: Image.Image, meaning: Meaning, *, dot: bool, frame: bool) -> Judgement:
    """What the picture shows beside its effects.

    A filled ring is a circle, so a picture with a dot is judged as it is where a ring is meant.
    """
    inside = effects.without_frame(image) if frame else image
    return judge(effects.filled(inside) if dot and meaning.shape != "ring" else inside)


def strengths(
    images: Sequence[Image.Image], meanings: Sequence[Meaning], *, frame: bool
) -> tuple[float, float]:
    """Mean strength of the dot, rings left out, which are empty as they are, and of the frame."""
    dots = [
        effects.dot_strength(effects.without_frame(image) if frame else image)
        for image, meaning in zip(images, meanings, strict=True)
        if meaning.shape != "ring"
    ]
    return float(np.mean(dots)), float(np.mean([effects.frame_strength(one) for one in images]))


def main() -> None:
    """Print a line of figures for each way, and write its first pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", type=Path, help="folder of the adapters' files")
    parser.add_argument("--only", choices=["effects", "few-step"])
    parser.add_argument("--count", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of prompts and pictures")
    parser.add_argument("--sheet", type=Path, help="write the first pictures to this PNG")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["LORA_DIR"] = str(arguments.adapters)
    prompts, meanings = zip(*full_prompts(arguments.count, arguments.seed), strict=True)
    ways = {} if arguments.only == "few-step" else EFFECTS
    ways = ways if arguments.only == "effects" else {**ways, **FEW_STEPS}
    sheet: list[Image.Image] = []
    for label, job_input in ways.items():
        images = [draw(one, arguments.seed + i, job_input) for i, one in enumerate(prompts)]
        has_dot, has_frame = "dot" in label, "frame" in label
        seen = [
            judge_effects(image, meaning, dot=has_dot, frame=has_frame)
            for image, meaning in zip(images, meanings, strict=True)
        ]
        # A dot that touches the side of a star opens its outline.
        right = share_right(seen, meanings, least_iou=0.0 if has_dot else CLEAR_IOU)
        dot, frame = strengths(images, meanings, frame=has_frame)
        print(
            f"{label:26}right {right:6.1%}"
            f"  IoU {np.mean([one.iou for one in seen]):.3f}"
            f"  flat distance {np.mean([one.flat_distance for one in seen]):4.1f}"
            f"  dot {dot:5.2f}  frame {frame:5.2f}",
            flush=True,
        )
        sheet += images[:SHEET_COLUMNS]
    if arguments.sheet:
        contact_sheet(sheet, SHEET_COLUMNS).save(arguments.sheet)


if __name__ == "__main__":
    main()
