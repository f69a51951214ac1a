"""What a change of checkpoints costs, a start from a single file, and a picture in few steps.

The checkpoints are a folder in diffusers layout and a single file with the same weights, of SDXL's
full size (random fp16, 6.9 GB each, in a temporary folder) and without a refiner.

- swap: from the one to the other and back, as a job with `model` waits for it: another model goes,
  the weights come and a first picture is drawn. From the disk (its files in the page cache, and
  not), and, on a GPU, from the host's memory. The card has room for one of them.
- start: process start to ready, the single file against the folder, in turns.
- pictures: the default request, the base alone, and 4 steps without guidance, in turns: on a GPU of
  the full size, on a CPU of the embedded model, with its few-step LoRA if that is there.

It needs Linux. Each part is written as soon as it is measured; `--only` leaves the others as they
are in the file.

    python -m benchmarks.swap
    OMP_NUM_THREADS=1 python -m benchmarks.swap --only pictures
"""

import argparse
import asyncio
import contextlib
import gc
import hashlib
import io
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks import coldstart, common
from benchmarks.flops import count_flops, meta_networks
from benchmarks.pictures import random_weights
from benchmarks.sdxl_architecture import write_configs
from sdxl_worker.adapters.lora import read_lora
from sdxl_worker.adapters.of_request import NO_ADAPTERS, Adapters
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.few_step import recognise
from sdxl_worker.gpu import choose_device
from sdxl_worker.inputs.adapter_files import AdapterFile
from sdxl_worker.loading.file_hash import known_hash
from sdxl_worker.loading.model_dir import CONFIGS_DIR, find_model_dir
from sdxl_worker.loading.models import Models, add_refiner, load_base, load_models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.safetensors_header import read_header
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.logs import JsonFormatter
from sdxl_worker.serving.model_memory import ModelMemory
from sdxl_worker.serving.models_kept import ModelsKept
from sdxl_worker.serving.threads import on_gpu_thread
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tools import original_format
from tools.random_model import write_weights

PARTS = ("swap", "start", "pictures")
# The names in MODELS_DIR.
FOLDER, FILE = LAYOUTS = ("folder", "file")
FEW_STEP_LORA = EMBEDDED_MODEL_DIR.parent / "adapters" / "few-step.safetensors"
Dtype = Literal["float16", "bfloat16"]
# A CPU without fp16 of its own takes hundreds of times longer for a convolution in it.
DTYPES: dict[str, Dtype] = {"cuda": "float16", "cpu": "bfloat16"}

JOB = {"prompt": "a red circle on a blue background", "seed": 3}
REQUESTS: dict[str, dict[str, Any]] = {
    "default": JOB,
    "base": {**JOB, "refiner_inference_steps": 0},
    "few_steps": {
        **JOB,
        "refiner_inference_steps": 0,
        "num_inference_steps": 4,
        "guidance_scale": 1,
        "scheduler": "K_EULER",
        "schedule": "trailing",
    },
}


def write_models(models_dir: Path, model: str, device: str) -> None:
    """Make a MODELS_DIR with the same weights as a folder and as a single file.

    Args:
        model: "full" or "embedded".
    """
    folder = models_dir / FOLDER
    if model == "full":
        shutil.rmtree(write_configs(folder) / "refiner")
        write_weights(folder, torch.float16, device)
    else:
        shutil.copytree(EMBEDDED_MODEL_DIR / "base", folder / "base")
    without_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder, models_dir / CONFIGS_DIR.name, ignore=without_weights)
    tensors = original_format.base_checkpoint(folder / "base")
    original_format.save(tensors, path_of(FILE, models_dir))


def path_of(layout: str, models_dir: Path) -> Path:
    return models_dir / (f"{FILE}.safetensors" if layout == FILE else FOLDER)


def weight_files(layout: str, models_dir: Path) -> list[Path]:
    path = path_of(layout, models_dir)
    return [path] if layout == FILE else sorted(path.rglob("*.safetensors"))


def to_page_cache(files: Sequence[Path]) -> None:
    buffer = bytearray(2**22)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def out_of_page_cache(files: Sequence[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


PREPARE: dict[str, Callable[[Sequence[Path]], None]] = {
    "cold": out_of_page_cache,
    "warm": to_page_cache,
    "host": lambda _: None,
}


class RoomForOne(ModelMemory):
    """Of the card. The other model goes to the host, or is dropped."""

    def __init__(self, *, others_on_host: bool) -> None:
        self._others_on_host = others_on_host

    def fits_card(self, size_bytes: int) -> bool:  # noqa: ARG002
        return False  # before those that are there have gone

    def fits_host(self, size_bytes: int) -> bool:  # noqa: ARG002
        return self._others_on_host


def swaps(
    models_dir: Path, states: Sequence[str], rounds: int, dtype: Dtype
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Each swap's figures, by where the weights were and by layout.

    Args:
        states: "host"; or "cold" and "warm", from the disk.
    """
    settings = Settings(model_dir=path_of(FOLDER, models_dir), models_dir=models_dir, dtype=dtype)
    figures: dict[str, dict[str, list[dict[str, float]]]] = {
        state: {layout: [] for layout in LAYOUTS} for state in states
    }
    kept: ModelsKept[Path, Models] = ModelsKept(RoomForOne(others_on_host="host" in states))
    with patch.multiple(start_module, _kept=kept, _starts={}, _loads={}):
        start_module.start(settings).result()
        swap(FILE, settings)
        while known_hash(path_of(FILE, models_dir)) is None:
            time.sleep(0.1)  # it is read for its hash once, which would disturb
        for _ in tqdm(range(rounds), unit="round"):
            for state, of_state in figures.items():
                for layout in LAYOUTS:
                    PREPARE[state](weight_files(layout, models_dir))
                    of_state[layout].append(swap(layout, settings))
    gc.unfreeze()  # a start hides what there is from the garbage collector
    gc.collect()
    return figures


def swap(layout: str, settings: Settings) -> dict[str, float]:
    """Seconds until a model is on the card, and what was read from the disk for it."""

    async def job() -> None:
        models = await start_module.ready_models(settings, layout)
        await on_gpu_thread(start_module.put_on_card, models, settings)

    with worker_log() as log:
        read_before = bytes_read()
        started = time.perf_counter()
        asyncio.run(job())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {
            "seconds": round(seconds, 2),
            "first_picture_s": round(coldstart.phases(log.getvalue())["first_pictures_s"], 2),
            "read_gb": round((bytes_read() - read_before) / 1e9, 2),
        }


@contextlib.contextmanager
def worker_log() -> Iterator[io.StringIO]:
    text, logger = io.StringIO(), logging.getLogger("sdxl_worker")
    handler, level = logging.StreamHandler(text), logger.level
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield text
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def bytes_read() -> int:
    """From a disk, by this process, mapped files included."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith("read_bytes:")]
    return int(line.split()[1])


def starts(models_dir: Path, pairs: int, dtype: Dtype) -> dict[str, list[float]]:
    """Seconds from a process's start to ready, by layout. The files are in the page cache."""
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for pair in tqdm(range(pairs + 1), unit="pair"):
        for layout in LAYOUTS if pair % 2 else reversed(LAYOUTS):
            # Both and a worker would not fit a small machine's memory.
            for other in LAYOUTS:
                out_of_page_cache(weight_files(other, models_dir))
            to_page_cache(weight_files(layout, models_dir))
            environment = {"MODEL_DIR": str(path_of(layout, models_dir)), "DTYPE": dtype}
            started = coldstart.measure(coldstart.command("sdxl-worker"), environment)
            if pair > 0:  # the libraries' files were on the disk
                seconds[layout].append(round(started.ready_s, 2))
    return seconds


def few_step_adapters(models: Models) -> Adapters:
    """The embedded model's few-step LoRA, or nothing where there is none."""
    if not FEW_STEP_LORA.is_file():
        return NO_ADAPTERS
    digest = hashlib.sha256(FEW_STEP_LORA.read_bytes()).hexdigest()
    header = read_header(FEW_STEP_LORA)
    file = AdapterFile(FEW_STEP_LORA, digest, FEW_STEP_LORA.name, header)
    lora = read_lora(file, 1.0, "loras[0].path", models)
    return Adapters((lora,), few_step=recognise(file.name, digest, header.metadata))


def pictures(
    models: Mapping[str, Models], adapters: Mapping[str, Adapters], rounds: int
) -> dict[str, list[float]]:
    """Seconds of a picture, from the request to pixels on the host, by `REQUESTS`.

    Args:
        models: for each request; adapters too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in REQUESTS}
    for i in tqdm(range(rounds + 1), unit="round"):
        for name, fields in REQUESTS.items():
            request = parse_request(fields)
            started = time.perf_counter()
            generate(
                request,
                plan_stages(request, models[name]),
                models[name],
                adapters=adapters[name],
            )
            if i > 0:  # the first picture takes longer
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(values: Sequence[float], to: Sequence[float]) -> dict[str, Any]:
    """Median and range of the paired ratios."""
    pairs = [one / other for one, other in zip(values, to, strict=True)]
    return {
        "median": round(statistics.median(pairs), 3),
        "range": [round(min(pairs), 3), round(max(pairs), 3)],
    }


def measure_swap(models_dir: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    dtype = DTYPES[device.type]
    size = sum(path.stat().st_size for path in weight_files(FOLDER, models_dir))
    # Without a GPU, the card is the host: nothing moves between them.
    from_host = swaps(models_dir, ["host"], rounds, dtype) if device.type == "cuda" else None
    return {
        "dtype": dtype,
        "weights_gb": round(size / 1e9, 2),
        "from_disk": swaps(models_dir, ["cold", "warm"], rounds, dtype),
        "from_host": from_host and from_host["host"],
    }


def measure_start(models_dir: Path, pairs: int, device: torch.device) -> dict[str, Any]:
    dtype = DTYPES[device.type]
    seconds = starts(models_dir, pairs, dtype)
    file_by_folder = ratios(seconds[FILE], seconds[FOLDER])
    return {"dtype": dtype, "ready_s": seconds, "file_by_folder": file_by_folder}


def measure_pictures(rounds: int, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        full = write_configs(Path(temporary) / "full")
        flops = count_flops(meta_networks(full), 1024, 1024)
        if device.type == "cuda":
            placement = Placement(device, torch.float16, resident=True)
            weights = random_weights(find_model_dir(Settings(model_dir=full)), placement)
            models = dict.fromkeys(REQUESTS, add_refiner(load_base(weights), weights))
        else:
            # One that keeps its LoRA, as between jobs that ask for the same.
            embedded = find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR))
            models = dict.fromkeys(REQUESTS, load_models(embedded))
            models["few_steps"] = load_models(embedded)
    adapters = dict.fromkeys(REQUESTS, NO_ADAPTERS)
    if device.type == "cpu":
        adapters["few_steps"] = few_step_adapters(models["few_steps"])
    seconds = pictures(models, adapters, rounds)
    few_steps = parse_request(REQUESTS["few_steps"]).num_inference_steps
    default = parse_request(REQUESTS["default"])
    of_default = flops.of_picture(default.num_inference_steps, default.refiner_steps_run)
    return {
        "model": "full" if device.type == "cuda" else "embedded",
        "few_step_lora": bool(adapters["few_steps"].loras),
        "rounds": rounds,
        "median_s": {name: round(statistics.median(all_), 3) for name, all_ in seconds.items()},
        "by_default": {
            name: ratios(seconds[name], seconds["default"]) for name in ("base", "few_steps")
        },
        # Computed, for SDXL at 1024x1024; without guidance, and with one text.
        "few_steps_of_operations": round(
            (few_steps * flops.base + flops.decode + flops.text) / of_default, 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=DTYPES, help="not given: a GPU if there is one")
    parser.add_argument(
        "--model", choices=("full", "embedded"), default="full", help="of swap and start"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of swaps and starts (default: 3)")
    parser.add_argument("--pictures", type=int, default=15, help="rounds of them (default: 15)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    device = choose_device()
    if arguments.device not in (None, device.type):
        parser.error(f"--device {arguments.device}: there is none")

    path = arguments.out / f"swap-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write(part: str, figures: Mapping[str, Any]) -> None:
        result[part] = {**common.machine(device.type), **figures}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    if "pictures" in arguments.only:
        write("pictures", measure_pictures(arguments.pictures, device))
    if {"swap", "start"} & {*arguments.only}:
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder), arguments.model, device.type)
            of_model = {"model": arguments.model}
            if "swap" in arguments.only:
                write("swap", of_model | measure_swap(Path(folder), arguments.rounds, device))
            if "start" in arguments.only:
                write("start", of_model | measure_start(Path(folder), arguments.rounds, device))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
