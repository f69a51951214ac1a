"""How far a picture of a batch is from the same seed alone, and what the memory plan changes.

The embedded model on this machine's device, 28 ways to draw eight pictures, and the three things
that a worker does where memory is short. Of 255 levels; it takes ten minutes on a CPU.

    python -m benchmarks.rounding
"""

import argparse
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks import common
from benchmarks.ways import psnr_db
from sdxl_worker.drawing import batches
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.samplers import SAMPLERS
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings

PROMPT = "a red circle on a blue background"
WAYS: dict[str, dict[str, object]] = {
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


def draw(models: Models, **job_input: object) -> list[Image.Image]:
    request = parse_request({"prompt": PROMPT, "seed": 100, **job_input})
    coarse = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((128, 128))
    canvas = Canvas(picture, picture, None) if request.image_url else None
    return generate(request, plan_stages(request, models), models, canvas)


def compared(pictures: list[Image.Image], others: list[Image.Image]) -> tuple[str, str, str]:
    """The largest difference in levels, the share of values that differ, and PSNR."""
    one, other = (np.stack([np.asarray(p, np.int16) for p in ps]) for ps in (pictures, others))
    levels = np.abs(one - other)
    return (
        str(levels.max()),
        f"{100 * float((levels > 0).mean()):.3f}%",
        f"{psnr_db(pictures, others):.0f} dB",
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    models = load_models(find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR)))
    rows: list[tuple[str, ...]] = [("eight pictures", "levels", "values that differ", "PSNR")]
    for way, options in WAYS.items():
        for sampler in SAMPLERS:
            job: dict[str, object] = {**options, "scheduler": sampler}
            alone = [draw(models, **job, seed=100 + i)[0] for i in range(8)]
            rows.append((f"{way}, {sampler}", *compared(draw(models, **job, num_images=8), alone)))
    together = draw(models, num_images=8)
    for name, plan in PLANS.items():
        with mock.patch.object(batches, "plan", lambda *_, plan=plan, **__: plan):
            rows.append((name, *compared(draw(models, num_images=8), together)))
    print(common.markdown_table(rows))


if __name__ == "__main__":
    main()
