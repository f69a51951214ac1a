"""From the start of a worker's process to its readiness for jobs, phase by phase, without the SDK.

For a machine that lacks the SDK; `coldstart.py` has it. MODEL_DIR and the worker's other variables
hold, COMPILE is set to each of the modes. With the weights in the page cache, and then taken out of
it. The first start is often slower: it brings the libraries into the page cache. Afterwards two
jobs are drawn: what the start leaves to the first one is seen there.

    MODEL_DIR=sdxl-random python -m benchmarks.start_without_sdk
    python -m benchmarks.start_without_sdk --model full --modes none graphs blocks
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks import bare_worker, common, page_cache
from benchmarks.full_size_model import model_dir
from sdxl_worker.serving.start import CHECK_INPUT_ON_CPU
from sdxl_worker.settings import EMBEDDED_MODEL_DIR

# In the order of the start. What it does a second time is of the refiner.
PHASES = {
    "imported the libraries": ("imported_s",),
    "loaded the base": ("base_loaded_s",),
    "loaded the refiner": ("refiner_loaded_s",),
    "drew a first picture": ("base_picture_s", "refiner_picture_s"),
    bare_worker.JOBS[0]: ("first_job_s",),
    bare_worker.JOBS[1]: ("second_job_s",),
}
MODES = ("none", "auto", "graphs", "blocks", "full")
# A request's defaults.
JOB: dict[str, Any] = {"prompt": "a red circle on a blue background", "seed": 3}
# More of the worker's steps than a start has, and no more.
JOB_ON_CPU = {**CHECK_INPUT_ON_CPU, "num_inference_steps": 4}


@dataclass(frozen=True)
class Start:
    """Seconds of one start. What the log does not tell is 0."""

    ready_s: float
    """From the process's start to its readiness for jobs."""
    imported_s: float = 0.0
    base_loaded_s: float = 0.0
    base_picture_s: float = 0.0
    refiner_loaded_s: float = 0.0
    refiner_picture_s: float = 0.0
    first_job_s: float = 0.0
    """Of the drawing; and so of the second."""
    second_job_s: float = 0.0
    peak_memory_mb: float = 0.0
    """Of the GPU, until the end of the second job."""

    @property
    def rest_s(self) -> float:
        """Python, settings, CUDA's start, and what has no line in the log."""
        told = (self.imported_s, self.base_loaded_s, self.base_picture_s)
        return self.ready_s - sum(told) - self.refiner_loaded_s - self.refiner_picture_s


COLUMNS = (
    *("model", "COMPILE", "page_cache", "share_kept", "number"),
    *(field.name for field in fields(Start)),
    *("rest_s", "note"),
)


class StartError(Exception):
    """The worker did not become ready, or drew no job."""


def figures(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of `Start`, but for `ready_s`: what lines of the worker's log tell."""
    told: dict[str, float] = {}
    for line in lines:
        for words, names in PHASES.items():
            if str(line.get("message")).startswith(words) and "seconds" in line:
                name = next((name for name in names if name not in told), names[-1])
                told[name] = float(line["seconds"])
        if "peak_memory_mb" in line:
            told["peak_memory_mb"] = float(line["peak_memory_mb"])
    return told


def measure(environment: Mapping[str, str], job: Mapping[str, Any]) -> Start:
    """Start one worker, have it draw the job twice, and wait for its end. Its log is printed.

    Raises:
        StartError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.bare_worker", json.dumps(job)]
    started = time.perf_counter()
    ready_s = 0.0
    lines = []
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    ) as process:
        for text in process.stdout or ():
            print(text, end="")
            try:
                line = json.loads(text)
            except ValueError:
                continue  # a library's warning
            if not isinstance(line, dict):
                continue
            lines.append(line)
            if line.get("message") == bare_worker.READY:
                ready_s = time.perf_counter() - started
    if process.returncode != 0:
        last = "became ready" if ready_s else "did not become ready"
        raise StartError(f"the worker {last}, and ended with status {process.returncode}")
    return Start(ready_s=ready_s, **figures(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("full",), default="", help="not given: MODEL_DIR")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["none", "graphs"])
    parser.add_argument("--caches", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--repeats", type=int, default=2, help="of each (default: 2)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    with model_dir(arguments.model) as environment:
        failed = run(environment, arguments)
    sys.exit(1 if failed else 0)


def run(environment: Mapping[str, str], arguments: argparse.Namespace) -> bool:
    """All starts.

    Returns:
        Whether one failed.
    """
    import torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    root = Path(environment.get("MODEL_DIR") or os.environ.get("MODEL_DIR") or EMBEDDED_MODEL_DIR)
    machine = common.machine(on) | {"model": arguments.model or root.name}
    device = machine["device"] if on == "cuda" else on
    results = common.CsvFile(
        arguments.out / f"start-{common.slug(device)}.csv", [*common.machine(on), *COLUMNS]
    )
    weights = list(root.rglob("*.safetensors"))
    shown = COLUMNS[1:]
    table: list[Sequence[object]] = [shown]
    failed = False
    for cache in arguments.caches:
        for mode in arguments.modes:
            for number in range(1, arguments.repeats + 1):
                row = machine | {"COMPILE": mode, "page_cache": cache, "number": number}
                if cache == "cold":
                    page_cache.forget(weights)
                share = page_cache.share_kept(weights)
                row["share_kept"] = "" if share is None else round(share, 2)
                variables = {**environment, "COMPILE": "" if mode == "none" else mode}
                print(f"--- COMPILE {mode}, {cache}, start {number}", flush=True)
                try:
                    start = measure(variables, JOB if on == "cuda" else JOB_ON_CPU)
                except StartError as error:
                    failed = True
                    row["note"] = str(error)
                    print(error, flush=True)
                else:
                    seconds = {**asdict(start), "rest_s": start.rest_s}
                    row |= {name: round(value, 2) for name, value in seconds.items()}
                results.add(row)
                table.append([row.get(name, "") for name in shown])
    print(common.markdown_table(table))
    return failed


if __name__ == "__main__":
    main()
