"""What STEP_CACHE costs and spares: the embedded model's accuracy, PSNR, seconds, operations.

All rows draw the same prompts and seeds in turn, with the default settings. PSNR compares with the
first row, whose steps are all whole, picture by picture.

    python -m benchmarks.step_cache
    python -m benchmarks.step_cache --model full --count 1 --size 256 --steps 10
    python -m benchmarks.step_cache --model /models/sdxl --count 20 --size 1024

The model "full" has SDXL's size, random weights and no refiner, so that it fits a laptop. Its
pictures are noise: they tell how far errors spread through such networks, not how a picture looks.
"""

import argparse
import contextlib
import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import common
from benchmarks.flops import count_flops, meta_networks
from benchmarks.pictures import RandomWeights
from benchmarks.sdxl_architecture import write_configs
from benchmarks.ways import psnr_db
from builder.shapes.evaluate import whole_prompts
from builder.shapes.judge import judge
from sdxl_worker.generate import generate
from sdxl_worker.model_dir import find_model_dir
from sdxl_worker.models import Models, load
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.weights import Placement, start_reading

ROWS = (None, 2, 3, 4, 5)
COLUMNS = (
    *("model", "dtype", "step_cache", "pictures", "size_px", "base_steps", "refiner_steps"),
    *("picture_s", "share_of_seconds", "psnr_db", "psnr_db_p5"),
    *("right", "shape", "color", "background", "iou"),
    *("tflop_full_size", "share_of_tflop"),
)
# The lower part of a picture's numbers, below which one in twenty is.
TWENTIETH = 20


@dataclass
class Drawn:
    """What one row drew so far, picture by picture."""

    seconds: list[float] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    shape: list[bool] = field(default_factory=list)
    color: list[bool] = field(default_factory=list)
    background: list[bool] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)


def measure(
    models: Models, *, count: int, size_px: int, base_steps: int, judged: bool
) -> dict[int | None, Drawn]:
    """Draw `count` prompts in each row.

    Args:
        judged: whether the pictures show what was asked at all.
    """
    drawn = {row: Drawn() for row in ROWS}
    rows = {row: dataclasses.replace(models, step_cache=row) for row in ROWS}
    seed = 1000
    for i, (prompt, meaning) in enumerate(tqdm(whole_prompts(count, seed), unit="prompt")):
        request = parse_request(
            {
                "prompt": prompt,
                "seed": seed + i,
                "width": size_px,
                "height": size_px,
                "num_inference_steps": base_steps,
            }
        )
        if i == 0:
            generate(request, models)  # the first picture takes longer
        reference: list[Image.Image] = []
        for row, of_row in rows.items():
            started = time.perf_counter()
            pictures = generate(request, of_row)
            drawn[row].seconds.append(time.perf_counter() - started)
            reference = reference or pictures
            drawn[row].psnr_db.append(psnr_db(pictures, reference))
            if judged:
                judgement = judge(pictures[0])
                drawn[row].right.append(judgement.matches(prompt))
                drawn[row].shape.append(judgement.shape == meaning.shape)
                drawn[row].color.append(judgement.color == meaning.color)
                drawn[row].background.append(judgement.background == meaning.background)
                drawn[row].iou.append(judgement.iou)
    return drawn


@contextlib.contextmanager
def full_size_base() -> Iterator[Models]:
    """About 7 GB, in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_configs(Path(folder) / "model")
        shutil.rmtree(root / "refiner")
        placement = Placement(torch.device("cpu"), torch.bfloat16, resident=True)
        yield load(RandomWeights(find_model_dir(Settings(model_dir=root)), placement))


@contextlib.contextmanager
def models_of(name: str) -> Iterator[Models]:
    """
    Args:
        name: "embedded", "full", or a MODEL_DIR.
    """
    if name == "full":
        with full_size_base() as models:
            yield models
    else:
        path = EMBEDDED_MODEL_DIR if name == "embedded" else Path(name)
        yield load(start_reading(find_model_dir(Settings(model_dir=path)), None))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="embedded, full or a MODEL_DIR")
    parser.add_argument("--count", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="px (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of the base (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        flops = count_flops(meta_networks(write_configs(Path(folder) / "model")), 1024, 1024)
    tflop = {row: flops.of_picture(25, 15, row or 1) for row in ROWS}
    with models_of(arguments.model) as models:
        drawn = measure(
            models,
            count=arguments.count,
            size_px=arguments.size,
            base_steps=arguments.steps,
            judged=arguments.model == "embedded",
        )

    machine = common.machine(models.device.type)
    name = f"step-cache-{common.slug(arguments.model)}"
    results = common.CsvFile(arguments.out / f"{name}.csv", [*machine, *COLUMNS])
    table: list[tuple[object, ...]] = [COLUMNS[2:]]
    for row, of_row in drawn.items():
        seconds = [statistics.median(one.seconds) for one in (of_row, drawn[None])]
        shares = {
            name: round(statistics.mean(values), 3)
            for name in ("right", "shape", "color", "background", "iou")
            if (values := getattr(of_row, name))
        }
        values = {
            "model": arguments.model,
            "dtype": str(models.dtype).removeprefix("torch."),
            "step_cache": row or "",
            "pictures": arguments.count,
            "size_px": arguments.size,
            "base_steps": arguments.steps,
            "refiner_steps": 15 if models.refiner else 0,
            "picture_s": round(seconds[0], 3),
            "share_of_seconds": round(seconds[0] / seconds[1], 3),
            "psnr_db": round(statistics.mean(of_row.psnr_db), 1),
            "psnr_db_p5": round(sorted(of_row.psnr_db)[arguments.count // TWENTIETH], 1),
            **shares,
            "tflop_full_size": round(tflop[row], 1),
            "share_of_tflop": round(tflop[row] / tflop[None], 3),
        }
        results.add({**machine, **values})
        table.append(tuple(values.get(name, "") for name in COLUMNS[2:]))
    print(common.markdown_table(table))
    chart(results.path)


def chart(path: Path) -> None:
    rows = common.read_csv(path)
    common.bar_chart(
        path.with_suffix(".png"),
        f"Time of a picture, {rows[0]['model']} model, {rows[0]['device']}",
        "of that with whole steps",
        [f"{row['step_cache'] or 'not set'}, {row['psnr_db']} dB" for row in rows],
        {"time": [float(row["share_of_seconds"]) for row in rows]},
    )


if __name__ == "__main__":
    main()
