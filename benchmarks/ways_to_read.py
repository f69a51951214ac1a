"""Ways to read the weights of a model to the device: seconds and GB/s, from the page cache and not.

The worker's own, with and without reading ahead, safetensors' `load_file`, several threads that
read into pinned buffers, and safetensors 0.9's `prefetch` where that version is installed. Each
reads all files of a MODEL_DIR.

    MODEL_DIR=sdxl-random python -m benchmarks.ways_to_read
    python -m benchmarks.ways_to_read --model full --ways worker pinned
"""

import argparse
import contextlib
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from benchmarks import common, page_cache
from benchmarks.full_size_model import model_dir
from sdxl_worker.loading.model_dir import ModelDir, find_model_dir
from sdxl_worker.loading.read_ahead import read_ahead
from sdxl_worker.loading.weights import start_reading
from sdxl_worker.placement import Placement
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings

THREADS = 8
# What one thread reads of a file before it takes up another part, and in one call.
PART_BYTES = 256 * 2**20
CHUNK_BYTES = 16 * 2**20

COLUMNS = (
    *("safetensors", "model", "way", "page_cache", "share_kept", "number"),
    *("seconds", "gigabytes", "gb_per_s", "note"),
)


@dataclass(frozen=True)
class Source:
    """What is read, and where to."""

    model_dir: ModelDir
    files: dict[str, list[Path]]
    """Of each network."""
    placement: Placement

    @property
    def paths(self) -> list[Path]:
        return list(dict.fromkeys(path for paths in self.files.values() for path in paths))

    @property
    def device(self) -> torch.device:
        return self.placement.device


def worker(source: Source) -> Any:
    """As the worker's start."""
    weights = start_reading(source.model_dir, source.files, source.placement)
    return [weights.take(network) for network in source.files]


def worker_with_read_ahead(source: Source) -> Any:
    read_ahead(source.paths)
    return worker(source)


def of_safetensors(source: Source) -> Any:
    """One thread, one file after the other."""
    return [load_file(path, device=str(source.device)) for path in source.paths]


def prefetch(source: Source) -> Any:
    """Of all files at once."""
    files: list[Any] = [
        safetensors.safe_open(path, framework="pt", device=str(source.device))
        for path in source.paths
    ]
    with contextlib.ExitStack() as around:
        loaders = [around.enter_context(file.prefetch(threads=THREADS)) for file in files]
        return [dict(loader) for loader in loaders]


def pinned(source: Source) -> dict[Path, torch.Tensor]:
    """The bytes of each file in one tensor. Each thread has two pinned buffers and a stream: it
    reads into one while the other is copied to the GPU."""
    on_gpu = source.device.type == "cuda"
    sizes = {path: path.stat().st_size for path in source.paths}
    targets = {
        path: torch.empty(size, dtype=torch.uint8, device=source.device)
        for path, size in sizes.items()
    }
    if on_gpu:
        torch.cuda.synchronize()  # their memory may still be in use on this thread's stream
    parts = [(path, at) for path, size in sizes.items() for at in range(0, size, PART_BYTES)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            stream = torch.cuda.Stream() if on_gpu else None
            buffers = [
                torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)
            ]
            copied = [torch.cuda.Event() if on_gpu else None for _ in buffers]
            turn = 0
            while True:
                try:
                    path, start = parts.pop(0)  # which no two threads do at once
                except IndexError:
                    break
                with path.open("rb", buffering=0) as file:
                    at, end = start, min(start + PART_BYTES, sizes[path])
                    while at < end:
                        buffer, event = buffers[turn], copied[turn]
                        if event is not None:
                            event.synchronize()
                        room = buffer.numpy().data[: min(CHUNK_BYTES, end - at)]
                        count = os.preadv(file.fileno(), [room], at)
                        if count == 0:
                            raise EOFError(f"{path} ends early")
                        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                            target = targets[path][at : at + count]
                            target.copy_(buffer[:count], non_blocking=on_gpu)
                            if event is not None:
                                event.record()
                        at += count
                        turn = 1 - turn
            if stream is not None:
                stream.synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return targets


WAYS: dict[str, Callable[[Source], Any]] = {
    "worker": worker,
    "worker, read ahead": worker_with_read_ahead,
    "load_file": of_safetensors,
    "pinned": pinned,
    "prefetch": prefetch,
}


def why_not(way: str, device: torch.device) -> str:
    """Why a way cannot be measured here; empty if it can."""
    if way != "prefetch":
        return ""
    if not hasattr(safetensors.safe_open, "prefetch"):
        return "safetensors 0.9 is needed"
    return "a GPU is needed" if device.type == "cpu" else ""


def seconds_of(way: str, source: Source) -> float:
    """Of one reading, until all is on the device. What was read is let go."""
    started = time.perf_counter()
    tensors = WAYS[way](source)
    if source.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    del tensors
    gc.collect()
    if source.device.type == "cuda":
        torch.cuda.empty_cache()  # the next way takes its memory itself
    return seconds


def run(source: Source, arguments: argparse.Namespace) -> bool:
    """All ways, cold and warm.

    Returns:
        Whether one failed.
    """
    on = source.device.type
    machine = common.machine(on) | {
        "safetensors": version("safetensors"),
        "model": arguments.model or source.model_dir.root.name,
    }
    name = common.slug(machine["device"]) if on == "cuda" else on
    columns = [*common.machine(on), *COLUMNS]
    results = common.CsvFile(arguments.out / f"reading-{name}.csv", columns)
    gigabytes = sum(path.stat().st_size for path in source.paths) / 1e9
    shown = ("way", "page_cache", "share_kept", "seconds", "gb_per_s", "note")
    table: list[Sequence[object]] = [shown]
    failed = False
    if on == "cuda":
        torch.empty(1, device=source.device)  # CUDA's own start is none of the first way
    for cache in arguments.caches:
        for way in arguments.ways:
            for number in range(1, arguments.repeats + 1):
                row: dict[str, object] = machine | {
                    "way": way,
                    "page_cache": cache,
                    "number": number,
                    "gigabytes": float(f"{gigabytes:.4g}"),
                }
                if reason := why_not(way, source.device):
                    row["note"] = f"not measured: {reason}"
                else:
                    if cache == "cold":
                        page_cache.forget(source.paths)
                    share = page_cache.share_kept(source.paths)
                    row["share_kept"] = "" if share is None else round(share, 2)
                    try:
                        seconds = seconds_of(way, source)
                    except Exception as error:
                        # Whatever goes wrong in one way must not cost the others.
                        failed = True
                        traceback.print_exc()
                        row["note"] = common.shortened(error)
                    else:
                        row["seconds"] = round(seconds, 3)
                        row["gb_per_s"] = float(f"{gigabytes / seconds:.3g}")
                results.add(row)
                table.append([row.get(column, "") for column in shown])
    print(common.markdown_table(table))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("full",), default="", help="not given: MODEL_DIR")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--caches", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--repeats", type=int, default=1, help="of each (default: 1)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with model_dir(arguments.model) as environment:
        root = environment.get("MODEL_DIR") or os.environ.get("MODEL_DIR") or EMBEDDED_MODEL_DIR
        found = find_model_dir(Settings(model_dir=Path(root)))
        placement = Placement(device, dtype, resident=True)
        failed = run(Source(found, found.weight_files("float16"), placement), arguments)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
