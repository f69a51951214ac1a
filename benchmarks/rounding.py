"""How far a picture of a batch is from the same seed alone, a job's drawn beside others from the
same job's alone, and what the memory plan changes.

The embedded model on a device, each way to draw eight pictures with each sampler, mixes of jobs of
any kind that begin at any time, and the three things that a worker does where memory is short. Of
255 levels; it takes half an hour on a CPU.

    python -m benchmarks.rounding
    python -m benchmarks.rounding --parts company --device cuda
"""

import argparse
import functools
import random
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import common
from benchmarks.company import any_request, side_by_side
from benchmarks.ways import psnr_db
from sdxl_worker.drawing import batches
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, add_refiner, load_base
from sdxl_worker.loading.weights import start_reading
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.samplers import SAMPLERS
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings

PROMPT = "a red circle on a blue background"
WAYS: dict[str, dict[str, Any]] = {
    "base alone": {"refiner_inference_steps": 0},
    "default": {},
    "ensemble": {"high_noise_frac": 0.8},
    "image_url": {"image_url": "https://example.com/a.png"},
}
PLANS = {
    "three at a time": Plan(3, slicing=False, tiling=False),
    "decoded one by one": Plan(8, slicing=True, tiling=False),
    "decoded in tiles": Plan(8, slicing=False, tiling=True),
}


Row = tuple[str, ...]


def models_on(device: str) -> Models:
    """In the number format that a worker takes there."""
    model_dir = find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR))
    dtype = torch.float32 if device == "cpu" else torch.float16
    placement = Placement(torch.device(device), dtype, resident=True)
    weights = start_reading(model_dir, model_dir.weight_files("float16"), placement)
    return add_refiner(load_base(weights), weights)


def draw(models: Models, *, shares_passes: bool = False, **job_input: Any) -> list[Image.Image]:
    request = parse_request({"prompt": PROMPT, "seed": 100, **job_input})
    coarse = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((request.width or 128, request.height or 128))
    canvas = Canvas(picture, picture, None) if request.image_url else None
    stages = plan_stages(request, models)
    return generate(request, stages, models, canvas, shares_passes=shares_passes)


def compared(pictures: list[Image.Image], others: list[Image.Image]) -> Row:
    """The largest difference in levels, the share of values that differ, and the worst PSNR."""
    one, other = (np.stack([np.asarray(p, np.int16) for p in ps]) for ps in (pictures, others))
    levels = np.abs(one - other)
    worst = min(psnr_db([p], [q]) for p, q in zip(pictures, others, strict=True))
    return str(levels.max()), f"{100 * float((levels > 0).mean()):.3f}%", f"{worst:.0f} dB"


def batches_and_seeds(models: Models) -> list[Row]:
    """Eight pictures of a request, and each seed alone."""
    rows = []
    for way, options in tqdm(WAYS.items(), unit="way"):
        for sampler in SAMPLERS:
            job = {**options, "scheduler": sampler}
            alone = [draw(models, **job, seed=100 + i)[0] for i in range(8)]
            rows.append((f"{way}, {sampler}", *compared(draw(models, **job, num_images=8), alone)))
    return rows


def in_company(models: Models, mixes: int) -> Row:
    """Jobs of any kind beside others of any kind, in any place and time, and each alone."""
    choose = random.Random(15)  # noqa: S311 - no secret
    together: list[Image.Image] = []
    alone: list[Image.Image] = []
    for _ in tqdm(range(mixes), unit="mix"):
        jobs = [any_request(choose) for _ in range(choose.randint(2, 8))]
        drawings = [functools.partial(draw, models, shares_passes=True, **job) for job in jobs]
        for pictures in side_by_side(drawings, choose):
            together += pictures
        for job in jobs:
            alone += draw(models, **job)
    return (f"{mixes} mixes, {len(alone)} pictures", *compared(together, alone))


def plans(models: Models) -> list[Row]:
    """Eight pictures as short memory has them drawn, and as they are drawn otherwise."""
    together = draw(models, num_images=8)
    rows = []
    for name, plan in PLANS.items():
        with mock.patch.object(batches, "plan", lambda *_, plan=plan, **__: plan):
            rows.append((name, *compared(draw(models, num_images=8), together)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parts = ("batches", "company", "plans")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--mixes", type=int, default=200, help="in company (default: 200)")
    arguments = parser.parse_args()

    models = models_on(arguments.device)
    rows: list[Row] = [("", "levels", "values that differ", "worst PSNR")]
    if "batches" in arguments.parts:
        rows += batches_and_seeds(models)
    if "company" in arguments.parts:
        rows.append(in_company(models, arguments.mixes))
    if "plans" in arguments.parts:
        rows += plans(models)
    print(common.markdown_table(rows))


if __name__ == "__main__":
    main()
