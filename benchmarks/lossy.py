"""What STEP_CACHE, QUANTIZE, FP16_ACCUMULATION and `guidance_end` cost and save: accuracy, PSNR,
seconds, operations, memory.

All rows draw the same prompts and seeds in turn, with the default settings. PSNR compares with the
row "none" picture by picture. Figures for the full size are computed, for 1024x1024.

    python -m benchmarks.lossy
    python -m benchmarks.lossy --model full --count 1 --size 256 --steps 10
    python -m benchmarks.lossy --model /models/sdxl --count 20 --size 1024

The model "full" has SDXL's size, random weights and no refiner, so that it fits a laptop. Its
pictures are noise: they show how far errors spread through such networks, not how a picture looks.

Nothing is compiled, and FP16_ACCUMULATION is emulated: the seconds of int8, fp8 and fp16 are not
those of a worker on a GPU, which `benchmarks.pictures` measures.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import common
from benchmarks.flops import count_eight_bits, count_flops, meta_networks
from benchmarks.fp16_sums import sum_in
from benchmarks.pictures import random_weights
from benchmarks.sdxl_architecture import write_configs
from benchmarks.ways import psnr_db
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_base, load_models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Quantization, Settings
from sdxl_worker.speed.quantize import quantize
from shapes.captions import full_prompts
from shapes.judge import judge

REFERENCE = "none"
STEP_CACHE_ROWS = {f"step_cache_{interval}": interval for interval in (2, 3, 4, 5)}
QUANTIZE_ROWS: dict[str, Quantization] = {"int8": "int8", "fp8": "fp8"}
GUIDANCE_ROWS = {f"guidance_end_{end}": end for end in (0.8, 0.6, 0.4)}
# The second is FP16_ACCUMULATION, emulated; the first is what it is added to on a GPU.
SUMS_ROWS = {"fp16": torch.float32, "fp16_accumulation": torch.float16}
ROWS = (REFERENCE, *STEP_CACHE_ROWS, *QUANTIZE_ROWS, *GUIDANCE_ROWS, *SUMS_ROWS)
COLUMNS = (
    *("model", "dtype", "row", "pictures", "size_px", "base_steps", "refiner_steps"),
    *("picture_s", "share_of_seconds"),
    *("psnr_db", "psnr_db_median", "psnr_db_p5", "psnr_db_worst"),
    *("right", "shape", "color", "background", "iou"),
    *("tflop_full_size", "share_of_tflop"),
    *("base_in_8_bits", "refiner_in_8_bits", "base_speedup_limit", "refiner_speedup_limit"),
    "saved_gb",
)
# One picture in twenty is below `psnr_db_p5`.
TWENTIETH = 20
COMPUTED_PX = 1024


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
    models: Models,
    rows: Sequence[str],
    *,
    count: int,
    size_px: int,
    base_steps: int,
    judged: bool,
) -> dict[str, Drawn]:
    """Draw `count` prompts in the row "none", and in each of `rows`.

    Args:
        judged: whether to judge the pictures, which the model must be able to draw.
    """
    models_of_row = {REFERENCE: models} | {row: _models_of_row(row, models) for row in rows}
    drawn = {row: Drawn() for row in models_of_row}
    seed = 1000
    for i, (prompt, meaning) in enumerate(tqdm(full_prompts(count, seed), unit="prompt")):
        request = parse_request(
            {
                "prompt": prompt,
                "seed": seed + i,
                "width": size_px,
                "height": size_px,
                "num_inference_steps": base_steps,
            }
        )
        stages = plan_stages(request, models)
        if i == 0:
            generate(request, stages, models)  # the first picture takes longer
        reference: list[Image.Image] = []
        for row, of_row in models_of_row.items():
            started = time.perf_counter()
            interval = STEP_CACHE_ROWS.get(row)
            asked = request.model_copy(update={"guidance_end": GUIDANCE_ROWS.get(row, 1.0)})
            pictures = generate(asked, stages, of_row, step_cache_interval=interval)
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


def _models_of_row(row: str, models: Models) -> Models:
    """With UNets of their own where a row rounds them, permanently; the rest is shared."""
    if row in QUANTIZE_ROWS:
        change = functools.partial(_quantize, quantization=QUANTIZE_ROWS[row])
    elif row in SUMS_ROWS:
        change = functools.partial(sum_in, dtype=SUMS_ROWS[row])
    else:
        return models
    models = dataclasses.replace(
        models, unet=copy.deepcopy(models.unet), refiner_unet=copy.deepcopy(models.refiner_unet)
    )
    for unet in models.unets():
        change(unet)
    return models


def _quantize(unet: Any, quantization: Quantization) -> None:
    on_cpu = unet.device.type == "cpu"
    # torch multiplies fp8 on a CPU, too, but torchao does not know of it.
    unchecked = mock.patch("torchao.quantization.quant_api._check_hardware_support")
    with unchecked if on_cpu else contextlib.nullcontext():
        quantize(unet, quantization)


@contextlib.contextmanager
def full_size_base() -> Iterator[Models]:
    """About 7 GB, in bfloat16; as much again for both kinds of 8 bits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        root = write_configs(Path(folder) / "model")
        shutil.rmtree(root / "refiner")
        placement = Placement(device, torch.bfloat16, resident=True)
        yield load_base(random_weights(find_model_dir(Settings(model_dir=root)), placement))


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
        yield load_models(find_model_dir(Settings(model_dir=path)))


def computed() -> dict[str, dict[str, object]]:
    """The columns of each row that are counted on the full-size networks."""
    with tempfile.TemporaryDirectory() as folder:
        networks = meta_networks(write_configs(Path(folder) / "model"))
    flops = count_flops(networks, COMPUTED_PX, COMPUTED_PX)
    base, refiner = (
        count_eight_bits(networks[name], COMPUTED_PX, COMPUTED_PX)
        for name in ("unet", "refiner_unet")
    )
    eight_bits = {
        "base_in_8_bits": round(base.share, 3),
        "refiner_in_8_bits": round(refiner.share, 3),
        "base_speedup_limit": round(base.speedup_limit, 3),
        "refiner_speedup_limit": round(refiner.speedup_limit, 3),
        "saved_gb": round(base.saved_gb + refiner.saved_gb, 2),
    }
    all_deep = flops.of_picture(25, 15)
    columns: dict[str, dict[str, object]] = {}
    for row in ROWS:
        tflop = flops.of_picture(
            25, 15, STEP_CACHE_ROWS.get(row, 1), guidance_end=GUIDANCE_ROWS.get(row, 1.0)
        )
        columns[row] = {
            "tflop_full_size": round(tflop, 1),
            "share_of_tflop": round(tflop / all_deep, 3),
            **(eight_bits if row in QUANTIZE_ROWS else {}),
        }
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="embedded, full or a MODEL_DIR")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=ROWS,
        metavar="ROW",
        help=f"beside {REFERENCE} (default: {' '.join(ROWS[1:])})",
    )
    parser.add_argument("--count", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="px (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of the base (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    columns = computed()
    with models_of(arguments.model) as models:
        drawn = measure(
            models,
            arguments.rows,
            count=arguments.count,
            size_px=arguments.size,
            base_steps=arguments.steps,
            judged=arguments.model == "embedded",
        )

    machine = common.machine(models.device.type)
    name = f"lossy-{common.slug(arguments.model)}"
    results = common.CsvFile(arguments.out / f"{name}.csv", [*machine, *COLUMNS])
    table: list[tuple[object, ...]] = [COLUMNS[2:]]
    for row, of_row in drawn.items():
        seconds = [statistics.median(one.seconds) for one in (of_row, drawn[REFERENCE])]
        shares = {
            name: round(statistics.mean(values), 3)
            for name in ("right", "shape", "color", "background", "iou")
            if (values := getattr(of_row, name))
        }
        values = {
            "model": arguments.model,
            "dtype": str(models.dtype).removeprefix("torch."),
            "row": row,
            "pictures": arguments.count,
            "size_px": arguments.size,
            "base_steps": arguments.steps,
            "refiner_steps": 15 if models.refiner_unet else 0,
            "picture_s": round(seconds[0], 3),
            "share_of_seconds": round(seconds[0] / seconds[1], 3),
            "psnr_db": round(statistics.mean(of_row.psnr_db), 1),
            "psnr_db_median": round(statistics.median(of_row.psnr_db), 1),
            "psnr_db_p5": round(sorted(of_row.psnr_db)[arguments.count // TWENTIETH], 1),
            "psnr_db_worst": round(min(of_row.psnr_db), 1),
            **shares,
            **columns[row],
        }
        results.add({**machine, **values})
        table.append(tuple(values.get(name, "") for name in COLUMNS[2:]))
    print(common.markdown_table(table))
    chart(results.path)


def chart(path: Path) -> None:
    _, *rows = common.read_csv(path)
    if rows:
        common.bar_chart(
            path.with_suffix(".png"),
            f"PSNR of the median picture, {rows[0]['model']} model",
            "dB",
            [row["row"] for row in rows],
            {"PSNR": [float(row["psnr_db_median"]) for row in rows]},
        )


if __name__ == "__main__":
    main()
