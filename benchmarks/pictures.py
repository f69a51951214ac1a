"""Speed of pictures: `OPTIMIZATIONS`, plain diffusers and worker-sdxl 2.1.0's way.

On a GPU with the full-size SDXL and random weights, which are as fast as others; on a CPU with the
embedded model. The request is 2.1.0's default, 25 steps of the base and 15 of the refiner. The
hardware's limit is a matrix product measured in the same run. Each row is written as soon as it is
measured.

    python -m benchmarks.pictures
    python -m benchmarks.pictures --rows 2.1.0 worker graphs --batch 1 --quick
"""

import argparse
import contextlib
import gc
import itertools
import math
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

from benchmarks import common
from benchmarks.flops import count_flops, meta_networks
from benchmarks.overhead import sample_picture
from benchmarks.sdxl_architecture import write_configs
from benchmarks.ways import (
    Diffusers,
    FlashAttention,
    OneSize,
    Tuned,
    Version210,
    Way,
    Worker,
    psnr_db,
)
from sdxl_worker.gpu import peak_memory_bytes
from sdxl_worker.loading.model_dir import ModelDir, find_model_dir
from sdxl_worker.loading.models import Models, add_refiner, load_base
from sdxl_worker.loading.networks import NETWORKS, Network
from sdxl_worker.loading.weights import Tensors, Weights, start_reading
from sdxl_worker.placement import Placement
from sdxl_worker.request import Request, parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed.compiling import compiles
from sdxl_worker.speed.optimize import MODES, OPTIMIZATIONS
from tools.random_model import random_network

CHANNELS_LAST = frozenset({"channels_last"})
# The worker's rows, with their optimizations. Those of a mode of COMPILE have its name.
WORKER_ROWS: dict[str, frozenset[str]] = {
    "worker": frozenset(),
    "channels_last": CHANNELS_LAST,
    "direct_attention": CHANNELS_LAST | {"direct_attention"},
    "fuse_qkv": CHANNELS_LAST | {"fuse_qkv"},
    "flash_attention": CHANNELS_LAST,
    "fp16_accumulation": CHANNELS_LAST | {"fp16_accumulation"},
    "graphs": MODES["graphs"],
    "compile_blocks": CHANNELS_LAST | {"compile_blocks"},
    "blocks": MODES["blocks"],
    "compile_full": MODES["full"] - {"cuda_graphs"},
    "full": MODES["full"],
    "full_tuned": MODES["full"],
    "blocks_one_size": MODES["blocks"],
    "full_one_size": MODES["full"],
    "blocks+int8": MODES["blocks"] | {"int8"},
    "blocks+fp8": MODES["blocks"] | {"fp8"},
    "full+int8": MODES["full"] | {"int8"},
    "full+fp8": MODES["full"] | {"fp8"},
}
# These draw another picture: their PSNR is what they cost.
STEP_CACHE_ROWS = {"step_cache_2": 2, "step_cache_3": 3}
WORKER_ROWS |= dict.fromkeys(STEP_CACHE_ROWS, CHANNELS_LAST)
KINDS: dict[str, type[Worker]] = {
    "flash_attention": FlashAttention,
    "full_tuned": Tuned,
    "blocks_one_size": OneSize,
    "full_one_size": OneSize,
}
OTHER_ROWS: dict[str, type[Diffusers]] = {"2.1.0": Version210, "diffusers": Diffusers}
ROWS = (*OTHER_ROWS, *WORKER_ROWS)
REFERENCE = "worker"
NEEDS_GPU = frozenset({"flash_attention", "fp16_accumulation", "cuda_graphs", "fp8"})

COLUMNS = (
    *("dtype", "model", "row", "width", "height", "batch", "base_steps", "refiner_steps"),
    *("offload", *OPTIMIZATIONS, "step_cache"),
    *("first_picture_s", "picture_ms", "step_ms", "base_step_ms", "refiner_step_ms", "encode_ms"),
    "answer_ms",
    *("tflop", "tflop_per_s", "limit_tflop_per_s", "share_of_limit"),
    *("peak_memory_gb", "reserved_memory_gb", "psnr_db", "note"),
)


@dataclass(frozen=True)
class Options:
    device: torch.device
    dtype: torch.dtype
    model: str
    """"full" or "embedded"."""
    rows: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    batches: Sequence[int]
    base_steps: int
    refiner_steps: int
    """The length of the refiner's schedule, of which it runs 0.3."""
    repeats: int
    out: Path


@dataclass(frozen=True)
class Measured:
    """Milliseconds are for one picture of the batch."""

    first_picture_s: float
    """The first batch of this size: compilation, recording of graphs, libraries' own choices."""
    picture_ms: float
    base_step_ms: float
    refiner_step_ms: float
    encode_ms: float
    pictures: list[Image.Image]


def random_weights(model_dir: ModelDir, placement: Placement) -> Weights:
    """Random numbers, made on the device in place of files; the same ones each time."""

    def make(name: str, network: Network) -> Tensors:
        torch.manual_seed(list(NETWORKS).index(name))
        folder = model_dir.folder(network)
        return random_network(network, folder, placement.dtype, placement.device).state_dict()

    one_by_one = ThreadPoolExecutor(1, thread_name_prefix="random weights")
    parts = {
        name: [one_by_one.submit(make, name, network)]
        for name, network in model_dir.networks().items()
    }
    one_by_one.shutdown(wait=False)
    return Weights(model_dir, placement, parts)


class Clock:
    """Times on the device: on a GPU, those of the work, not those when it was queued."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._cuda else 1000 * (end - start)

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """What a large matrix product reaches: the best of 20, after 3."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(device)
    moments = [clock.now()]
    for _ in range(23):
        one @ other
        moments.append(clock.now())
    clock.wait()
    fastest_ms = min(clock.ms(*pair) for pair in itertools.pairwise(moments[3:]))
    return 2 * size**3 / fastest_ms / 1e9


def measure(way: Way, request: Request, device: torch.device, repeats: int) -> Measured:
    """Draw the request once, and then `repeats` times on the clock."""
    started = time.perf_counter()
    way.draw(request, lambda _: None)
    first_picture_s = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    clock = Clock(device)
    batches_s: list[float] = []
    steps_ms: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        moments: list[tuple[str, Any]] = []
        started = time.perf_counter()
        pictures = way.draw(request, lambda stage: moments.append((stage, clock.now())))  # noqa: B023
        batches_s.append(time.perf_counter() - started)
        clock.wait()
        for (stage, start), (next_stage, end) in itertools.pairwise(moments):
            if stage == next_stage:
                steps_ms[stage].append(clock.ms(start, end))

    # Not what was drawn: random weights draw noise, which takes longer to encode.
    sample = [sample_picture(*pictures[0].size)]
    started = time.perf_counter()
    way.encode(sample, request)
    encode_s = time.perf_counter() - started
    batch = request.num_images
    return Measured(
        first_picture_s=first_picture_s,
        picture_ms=1000 * statistics.median(batches_s) / batch,
        base_step_ms=statistics.median(steps_ms["base"] or [math.nan]) / batch,
        refiner_step_ms=statistics.median(steps_ms["refiner"] or [math.nan]) / batch,
        encode_ms=1000 * encode_s,
        pictures=pictures,
    )


def why_not(row: str, device: torch.device) -> str:
    """Why a row cannot be measured on the device; empty if it can."""
    if device.type != "cpu":
        return ""
    optimizations = WORKER_ROWS.get(row, frozenset())
    if needs := ({row} | optimizations) & NEEDS_GPU:
        return f"{' and '.join(sorted(needs))}: a GPU is needed"
    if compiles(optimizations) and shutil.which("c++") is None:
        return "compiling needs a C++ compiler"
    return ""


def run(options: Options) -> Path:
    """Measure all rows.

    Returns:
        The path of the CSV.
    """
    on = options.device.type
    machine = common.machine(on)
    name = f"pictures-{common.slug(machine['device']) if on == 'cuda' else 'cpu'}"
    results = common.CsvFile(options.out / f"{name}.csv", [*machine, *COLUMNS])
    limit = matmul_tflop_per_s(options.device, options.dtype)
    requests = [
        parse_request(
            {
                "prompt": "a red circle on a blue background",
                "seed": 3,
                "width": width,
                "height": height,
                "num_images": batch,
                "num_inference_steps": options.base_steps,
                "refiner_inference_steps": options.refiner_steps,
            }
        )
        for width, height in options.sizes
        for batch in options.batches
    ]
    with _model_dir(options.model) as model_dir:
        networks = meta_networks(model_dir.root)
        flops = {size: count_flops(networks, *size) for size in options.sizes}
        references = _references(requests, model_dir, options)
        _let_go(options.device)
        bar = tqdm(total=len(options.rows) * len(requests), unit="row")
        for row in options.rows:
            bar.set_description(row)
            for request, measured in _measure_row(row, requests, model_dir, options):
                values = machine | _described(row, request, options)
                if isinstance(measured, str):
                    values["note"] = f"not measured: {measured}"
                else:
                    tflop = flops[request.width or 0, request.height or 0].of_picture(
                        request.num_inference_steps,
                        request.refiner_steps_run,
                        STEP_CACHE_ROWS.get(row, 1),
                    )
                    values |= _figures(measured, request, options, tflop, limit)
                    psnr = psnr_db(measured.pictures, references[request])
                    values["psnr_db"] = round(psnr, 1)
                results.add(values)
                bar.update()
            _let_go(options.device)
        bar.close()
    report(results.path)
    return results.path


def _references(
    requests: Sequence[Request], model_dir: ModelDir, options: Options
) -> dict[Request, list[Image.Image]]:
    """What the other rows' pictures are compared with.

    Raises:
        RuntimeError: the networks' numbers are not finite, and all pictures would be alike.
    """
    way = _way(REFERENCE, _models(model_dir, options))
    references = {request: way.draw(request, lambda _: None) for request in requests}
    for picture in itertools.chain.from_iterable(references.values()):
        if picture.getcolors(1) is not None:
            raise RuntimeError(f"{REFERENCE} draws an empty picture: try --dtype bfloat16")
    return references


def _measure_row(
    row: str, requests: Sequence[Request], model_dir: ModelDir, options: Options
) -> Iterator[tuple[Request, Measured | str]]:
    """Each request's figures, or why there are none."""
    reason = why_not(row, options.device)
    # What earlier rows compiled would make a first picture quick.
    with contextlib.nullcontext() if reason else fresh_cache():
        if not reason:
            try:
                way = _way(row, _models(model_dir, options))
            except Exception as error:
                # Whatever goes wrong in one row must not cost the others.
                reason = common.shortened(error)
        for request in requests:
            measured: Measured | str = reason
            if not reason:
                try:
                    measured = measure(way, request, options.device, options.repeats)
                except Exception as error:
                    measured = common.shortened(error)
            yield request, measured


def _let_go(device: torch.device) -> None:
    """Free a row's networks, its recordings and what was compiled for it, and take back what it set
    for the process, before the next row."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _described(row: str, request: Request, options: Options) -> dict[str, object]:
    """The columns of one row that are known before it is measured."""
    return {
        "dtype": str(options.dtype).removeprefix("torch."),
        "model": options.model,
        "row": row,
        "width": request.width,
        "height": request.height,
        "batch": request.num_images,
        "base_steps": request.num_inference_steps,
        "refiner_steps": request.refiner_steps_run,
        "offload": int(row == "2.1.0" and options.device.type == "cuda"),
        **{name: int(name in WORKER_ROWS.get(row, ())) for name in OPTIMIZATIONS},
        "step_cache": STEP_CACHE_ROWS.get(row, 0),
    }


def _figures(
    measured: Measured, request: Request, options: Options, tflop: float, limit: float
) -> dict[str, object]:
    """The measured columns of one row.

    Args:
        tflop: of one picture.
        limit: of the hardware, in TFLOP/s.
    """
    reached = tflop / measured.picture_ms * 1000
    steps = request.num_inference_steps + request.refiner_steps_run
    figures: dict[str, object] = {
        "first_picture_s": round(measured.first_picture_s, 2),
        "picture_ms": round(measured.picture_ms, 1),
        "step_ms": round(measured.picture_ms / steps, 2),
        "base_step_ms": round(measured.base_step_ms, 2),
        "refiner_step_ms": round(measured.refiner_step_ms, 2),
        "encode_ms": round(measured.encode_ms, 1),
        "answer_ms": round(measured.picture_ms + measured.encode_ms, 1),
        # Digits, not decimals: the miniature's are thousandths.
        "tflop": float(f"{tflop:.4g}"),
        "tflop_per_s": float(f"{reached:.4g}"),
        "limit_tflop_per_s": float(f"{limit:.4g}"),
        "share_of_limit": round(reached / limit, 3),
    }
    if options.device.type == "cuda":
        figures["peak_memory_gb"] = round(peak_memory_bytes() / 1e9, 2)
        figures["reserved_memory_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return figures


@contextlib.contextmanager
def _model_dir(model: str) -> Iterator[ModelDir]:
    with tempfile.TemporaryDirectory() as folder:
        root = write_configs(Path(folder)) if model == "full" else EMBEDDED_MODEL_DIR
        yield find_model_dir(Settings(model_dir=root))


def _way(row: str, models: Models) -> Way:
    if row in OTHER_ROWS:
        return OTHER_ROWS[row](models)
    return KINDS.get(row, Worker)(models, WORKER_ROWS[row], STEP_CACHE_ROWS.get(row))


def _models(model_dir: ModelDir, options: Options) -> Models:
    """New ones for each row, because the optimizations change them permanently."""
    placement = Placement(options.device, options.dtype, resident=True)
    if options.model == "full":
        weights = random_weights(model_dir, placement)
    else:
        weights = start_reading(model_dir, model_dir.weight_files("float16"), placement)
    return add_refiner(load_base(weights), weights)


def report(path: Path) -> None:
    """Print a CSV as a table and draw its chart."""
    rows = common.read_csv(path)
    measured = [row for row in rows if row["picture_ms"]]
    of_210 = {
        (row["width"], row["height"], row["batch"]): float(row["answer_ms"])
        for row in measured
        if row["row"] == "2.1.0"
    }
    head = ("row", "size", "batch", "a picture", "a step", "of the limit", "PSNR", "first")
    lines: list[tuple[str, ...]] = [(*head, "with PNG, to 2.1.0")]
    for row in rows:
        size = f"{row['width']}x{row['height']}"
        if not row["picture_ms"]:
            lines.append((row["row"], size, row["batch"], row["note"], *[""] * 5))
            continue
        share = f"{float(row['share_of_limit']):.0%}"
        ms = (f"{row['picture_ms']} ms", f"{row['step_ms']} ms")
        more = (share, f"{row['psnr_db']} dB", f"{row['first_picture_s']} s")
        other = of_210.get((row["width"], row["height"], row["batch"]))
        times = f"{other / float(row['answer_ms']):.2f} times as fast" if other else ""
        lines.append((row["row"], size, row["batch"], *ms, *more, times))
    print(common.markdown_table(lines))
    if measured:
        first = measured[0]
        common.bar_chart(
            path.with_suffix(".png"),
            f"Milliseconds a picture, {first['model']} model, {first['device']}",
            "ms",
            [f"{row['row']}, {row['width']}x{row['height']}, {row['batch']}" for row in measured],
            {"ms": [float(row["picture_ms"]) for row in measured]},
        )


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--sizes", nargs="+", type=_size, metavar="WxH")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--model", choices=("full", "embedded"))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=3, help="after a first one (default: 3)")
    parser.add_argument("--quick", action="store_true", help="4 + 3 steps, once")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    parser.add_argument("--report", type=Path, metavar="CSV", help="only its table and chart")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report)
        return

    model = arguments.model or ("full" if gpu else "embedded")
    run(
        Options(
            device=device,
            dtype=getattr(torch, arguments.dtype or ("float16" if gpu else "float32")),
            model=model,
            rows=arguments.rows,
            sizes=arguments.sizes or [(1024, 1024) if model == "full" else (128, 128)],
            batches=arguments.batch,
            base_steps=4 if arguments.quick else 25,
            refiner_steps=10 if arguments.quick else 50,
            repeats=1 if arguments.quick else arguments.repeats,
            out=arguments.out,
        )
    )


if __name__ == "__main__":
    main()
