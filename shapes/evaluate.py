"""Lets the worker draw many prompts with the miniature model and counts what is right.

`python -m shapes.evaluate models/shapes --count 40 --sheet sheet.png` uses the worker's
defaults; `--schedulers all --modes all` compares all schedulers with and without the refiner.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.samplers import SAMPLERS
from sdxl_worker.settings import Settings
from shapes.captions import Meaning, full_prompts
from shapes.judge import Judgement, judge, parse_caption
from shapes.sheet import contact_sheet

MODES: dict[str, dict[str, Any]] = {
    "base": {"refiner_inference_steps": 0},
    "refined": {},
    "ensemble": {"high_noise_frac": 0.8},
}


@dataclass(frozen=True)
class Sample:
    """A prompt, what it means, and the picture drawn of it."""

    prompt: str
    meaning: Meaning
    image: Image.Image
    judgement: Judgement


def evaluate(
    models: Models, prompts: Sequence[tuple[str, Meaning]], job_input: dict[str, Any], *, seed: int
) -> list[Sample]:
    """Draw and judge each prompt; picture i has seed `seed` + i, the rest is `job_input`'s."""
    samples = []
    for i, (prompt, meaning) in enumerate(prompts):
        request = parse_request({**job_input, "prompt": prompt, "seed": seed + i})
        [image] = generate(request, plan_stages(request, models), models)
        samples.append(Sample(prompt, meaning, image, judge(image)))
    return samples


def figures(samples: Sequence[Sample]) -> str:
    """Shares of what is right, and how clean the pictures are, on one line."""

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


def main() -> None:
    """Print one line of figures for each combination of scheduler and mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with base/ and refiner/")
    parser.add_argument("--count", type=int, default=40, help="prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of prompts and pictures")
    parser.add_argument("--prompt", help="draw this prompt instead of a mixture")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--schedulers", nargs="+", default=["DDIM"], help='names, or "all"')
    parser.add_argument("--modes", nargs="+", default=["refined"], choices=[*MODES, "all"])
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[7.5])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--sheet", type=Path, help="write the pictures to this PNG")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    models = load_models(find_model_dir(Settings(model_dir=arguments.model)))
    prompts = full_prompts(arguments.count, arguments.seed)
    if arguments.prompt:
        prompts = [(arguments.prompt, parse_caption(arguments.prompt))] * arguments.count
    schedulers = list(SAMPLERS) if "all" in arguments.schedulers else arguments.schedulers
    modes = list(MODES) if "all" in arguments.modes else arguments.modes
    images: list[Image.Image] = []
    for scheduler in schedulers:
        for mode in modes:
            for guidance_scale in arguments.guidance_scale:
                job_input = {
                    **MODES[mode],
                    "scheduler": scheduler,
                    "width": arguments.width,
                    "height": arguments.height,
                    "guidance_scale": guidance_scale,
                    "num_inference_steps": arguments.steps,
                    "negative_prompt": arguments.negative_prompt,
                }
                started = time.perf_counter()
                samples = evaluate(models, prompts, job_input, seed=arguments.seed)
                seconds = (time.perf_counter() - started) / len(samples)
                label = f"{scheduler:20}{mode:10}guidance {guidance_scale:<5}"
                print(f"{label}{figures(samples)}  {seconds:.2f} s", flush=True)
                if arguments.prompt:
                    print(tally(samples), flush=True)
                images += [sample.image for sample in samples]
    if arguments.sheet:
        contact_sheet(images).save(arguments.sheet)


if __name__ == "__main__":
    main()
