"""One pass of each UNet: its time, and the host's part of it. Is a pass bound by the host?

The host's part is one call into an idle device, which returns before the GPU is done: what it takes
to launch everything. A pass is one of ten in a row. Where the host takes as long as the pass, the
GPU waits for it, and CUDA graphs save the difference. For one picture, with guidance (two rows) and
without; the worker's default optimizations, cuDNN's choice by trial, and CUDA graphs.

On a GPU with the full-size SDXL and random weights, on a CPU with the embedded model.

    python -m benchmarks.passes
    python -m benchmarks.passes --ways eager graph --rows 2 --size 1024x1024
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from benchmarks.flops import unet_inputs
from benchmarks.pictures import random_weights
from benchmarks.sdxl_architecture import write_configs
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, add_refiner, load_base
from sdxl_worker.loading.weights import start_reading
from sdxl_worker.placement import Placement
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed.cuda_graphs import forget_recordings
from sdxl_worker.speed.optimize import MODES, optimize

WAYS = ("eager", "cudnn.benchmark", "graph")
CALLS = 5
IN_A_ROW = 10

COLUMNS = (
    *("dtype", "model", "network", "way", "rows", "width", "height"),
    *("operations", "first_s", "host_ms", "pass_ms", "host_share", "note"),
)


class Operations(TorchDispatchMode):
    """Counts the operations inside it, views and memory without content left out: on a GPU, each is
    a launch or a few."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty", "detach")):
            self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Measured:
    first_s: float
    """The first two passes: libraries' own choices, and the recording."""
    host_ms: float
    pass_ms: float


def inputs_of(unet: Any, rows: int, width: int, height: int) -> dict[str, Any]:
    """What the pipelines pass, of random numbers on the UNet's device."""
    device = unet.device

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: real(one) for name, one in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return torch.randn(value.shape, dtype=value.dtype, device=device)

    inputs: dict[str, Any] = real(unet_inputs(unet, rows, width, height))
    # As the worker writes it there before each pass.
    return inputs | {"timestep": torch.full((), 500.0, device=device)}


def measure(unet: Any, inputs: dict[str, Any]) -> Measured:
    sample = inputs["sample"]
    others = {name: value for name, value in inputs.items() if name != "sample"}
    # As the pipelines call it: `GraphedForward` takes these by position.
    given = (sample, others.pop("timestep"), others.pop("encoder_hidden_states"))

    def wait() -> None:
        if sample.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    for _ in range(2):
        unet(*given, **others)
    wait()
    first_s = time.perf_counter() - started
    host_s = []
    for _ in range(CALLS):
        wait()
        started = time.perf_counter()
        unet(*given, **others)
        host_s.append(time.perf_counter() - started)
    wait()
    started = time.perf_counter()
    for _ in range(IN_A_ROW):
        unet(*given, **others)
    wait()
    passed_s = (time.perf_counter() - started) / IN_A_ROW
    return Measured(first_s, 1000 * statistics.median(host_s), 1000 * passed_s)


@contextlib.contextmanager
def as_way(unet: Any, way: str) -> Iterator[None]:
    """The UNet drawn with in that way."""
    forward, by_trial = unet.forward, torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = way == "cudnn.benchmark"
    if way == "graph":
        optimize(["cuda_graphs"], unet)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = by_trial
        forget_recordings([unet])
        unet.forward = forward


def why_not(way: str, device: torch.device) -> str:
    """Why a way cannot be measured on the device; empty if it can."""
    return f"{way}: a GPU is needed" if device.type == "cpu" and way != "eager" else ""


@contextlib.contextmanager
def models_of(model: str, placement: Placement) -> Iterator[Models]:
    """As a worker has them by default.

    Args:
        model: "full" or "embedded".
    """
    with tempfile.TemporaryDirectory() as folder:
        root = write_configs(Path(folder) / "sdxl") if model == "full" else EMBEDDED_MODEL_DIR
        found = find_model_dir(Settings(model_dir=root))
        if model == "full":
            weights = random_weights(found, placement)
        else:
            weights = start_reading(found, found.weight_files("float16"), placement)
        models = add_refiner(load_base(weights), weights)
        for unet in models.unets() if placement.device.type == "cuda" else ():
            optimize(MODES[None], unet)
        yield models


@torch.no_grad()
def run(models: Models, arguments: argparse.Namespace) -> bool:
    """All ways of both UNets.

    Returns:
        Whether one failed.
    """
    device = models.device
    machine = common.machine(device.type)
    name = common.slug(machine["device"]) if device.type == "cuda" else device.type
    results = common.CsvFile(arguments.out / f"passes-{name}.csv", [*machine, *COLUMNS])
    shown = ("network", "way", "rows", "operations", "host_ms", "pass_ms", "host_share", "note")
    table: list[Sequence[object]] = [shown]
    failed = False
    width, height = arguments.size or (models.native_size_px,) * 2
    unets: dict[str, Any] = {"base": models.unet, "refiner": models.refiner_unet}
    for network, unet in unets.items():
        for rows in arguments.rows:
            inputs = inputs_of(unet, rows, width, height)
            with Operations() as operations:
                unet(**inputs)
            for way in arguments.ways:
                row: dict[str, object] = machine | {
                    "dtype": str(models.dtype).removeprefix("torch."),
                    "model": arguments.model,
                    "network": network,
                    "way": way,
                    "rows": rows,
                    "width": width,
                    "height": height,
                    "operations": operations.count,
                }
                if reason := why_not(way, device):
                    row["note"] = f"not measured: {reason}"
                else:
                    try:
                        with as_way(unet, way):
                            measured = measure(unet, inputs)
                    except Exception as error:
                        # Whatever goes wrong in one way must not cost the others.
                        failed = True
                        traceback.print_exc()
                        row["note"] = common.shortened(error)
                    else:
                        row["first_s"] = round(measured.first_s, 3)
                        row["host_ms"] = round(measured.host_ms, 2)
                        row["pass_ms"] = round(measured.pass_ms, 2)
                        row["host_share"] = round(measured.host_ms / measured.pass_ms, 2)
                results.add(row)
                table.append([row.get(column, "") for column in shown])
    print(common.markdown_table(table))
    return failed


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rows", nargs="+", type=int, default=[2, 1], help="of a pass")
    parser.add_argument("--size", type=_size, metavar="WxH", help="default: the model's own")
    choices = ("full", "embedded")
    parser.add_argument("--model", choices=choices, default="full" if on_gpu else "embedded")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    placement = Placement(device, torch.float16 if on_gpu else torch.float32, resident=True)
    with models_of(arguments.model, placement) as models:
        failed = run(models, arguments)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
