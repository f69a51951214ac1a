"""From the start of a worker's process to its first request for a job, and where the time goes.

Two workers in turn, on the local endpoint and the same model: this one, and a straightforward one
(`straightforward_worker.py`). MODEL_DIR is for both, DTYPE, COMPILE and COMPILE_CACHE_DIR for this
one; what compilers cache by themselves is not kept between starts. The files are in the page cache:
the first pair of starts is not counted. The SDK's own checks run, as on the platform.

    python -m benchmarks.coldstart --repeats 5
    COMPILE=blocks COMPILE_CACHE_DIR=compiled python -m benchmarks.coldstart --model full

The model "full" has SDXL's size and random weights, 11.5 GB of them in a temporary folder.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks import common
from benchmarks.full_size_model import model_dir
from benchmarks.offline_worker import NAME_SERVER
from local_endpoint.local import LocalEndpoint
from local_endpoint.queue import Rules

WORKERS = {
    "sdxl-worker": "handler.py",
    "straightforward": "benchmarks/straightforward_worker.py",
}
# The variables with which the local endpoint turns off the SDK's own checks.
WITH_SDK_CHECKS = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "", "RUNPOD_SKIP_GPU_CHECK": ""}
TARGET_RATIO = 0.7
# Short, because requests for jobs are recorded when they are answered.
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Start:
    """Seconds of one start. What the log does not say is 0."""

    ready_s: float
    """From the process's start to its first request for a job."""
    cpu_s: float
    """CPU time of all its threads until then, which depends less on other work of the machine."""
    imported_s: float = 0.0
    loaded_s: float = 0.0
    first_pictures_s: float = 0.0

    @property
    def rest_s(self) -> float:
        """Python, settings, the SDK."""
        return self.ready_s - self.imported_s - self.loaded_s - self.first_pictures_s


PHASES = {
    "imported the libraries": "imported_s",
    "loaded the base": "loaded_s",
    "loaded the refiner": "loaded_s",
    "drew a first picture": "first_pictures_s",
}


def phases(log: str) -> dict[str, float]:
    """Seconds of the start's phases, from the worker's log in its form for the platform."""
    seconds: dict[str, float] = defaultdict(float)
    for text in log.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the SDK's banner, a library's warning
        if not isinstance(line, dict):
            continue
        for words, name in PHASES.items():
            if str(line.get("message")).startswith(f"{words} in "):
                seconds[name] += float(line["seconds"])
    return seconds


def command(worker: str) -> list[str]:
    """The command that starts one of `WORKERS`."""
    with contextlib.suppress(OSError), socket.create_connection(NAME_SERVER, timeout=2):
        return [sys.executable, WORKERS[worker]]
    return [sys.executable, "-m", "benchmarks.offline_worker", WORKERS[worker]]


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Start:
    """Start one worker, wait until it asks for a job, and end it."""
    # The process's own start time is known to a second only. The endpoint takes some ms to listen.
    started_at = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as compiled,
        LocalEndpoint(
            worker_command=command,
            environment={
                **WITH_SDK_CHECKS,
                **(environment or {}),
                "TORCHINDUCTOR_CACHE_DIR": compiled,
            },
            start_timeout_seconds=600,
            stop_grace_seconds=0,
            rules=Rules(poll_seconds=POLL_SECONDS),
        ) as endpoint,
    ):
        while True:  # the endpoint is entered at the worker's first ping, which may be earlier
            requests = list(endpoint.record.exchanges)
            asked_at = [one.came_at for one in requests if one.route.startswith("job-take")]
            if asked_at:
                break
            time.sleep(POLL_SECONDS)
        [worker] = endpoint.workers
        times = psutil.Process(worker.pid).cpu_times()
        return Start(
            ready_s=asked_at[0] - started_at,
            cpu_s=times.user + times.system,
            **phases(worker.log()),
        )


def medians(starts: Sequence[Start]) -> Start:
    """The median of each figure."""
    return Start(
        **{
            field.name: statistics.median(getattr(start, field.name) for start in starts)
            for field in fields(Start)
        }
    )


def chart(ours: Start, other: Start, path: Path) -> None:
    common.bar_chart(
        path,
        "Process start to ready for jobs, medians",
        "seconds",
        list(WORKERS),
        {
            "imports": [ours.imported_s, 0.0],
            "loading": [ours.loaded_s, 0.0],
            "first pictures": [ours.first_pictures_s, 0.0],
            "the rest, or not told": [ours.rest_s, other.rest_s],
        },
        target=TARGET_RATIO * other.ready_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("full",), default="", help="not given: MODEL_DIR")
    parser.add_argument("--repeats", type=int, default=5, help="of each worker (default: 5)")
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    import torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    compile_mode = os.environ.get("COMPILE", "")
    setup = common.machine(on) | {
        "model": arguments.model or Path(os.environ.get("MODEL_DIR") or "embedded").name,
        "COMPILE": compile_mode,
        "compile_cache": int("COMPILE_CACHE_DIR" in os.environ),
    }
    columns = [*setup, "worker", *(field.name for field in fields(Start))]
    name = "-".join(["coldstart", on, *([compile_mode] if compile_mode else [])])
    results = common.CsvFile(arguments.out / f"{name}.csv", columns)
    starts: dict[str, list[Start]] = {worker: [] for worker in WORKERS}
    pairs = range(arguments.repeats + 1)
    with model_dir(arguments.model) as environment:
        for pair, worker in tqdm([(pair, worker) for pair in pairs for worker in WORKERS]):
            start = measure(command(worker), environment)
            if pair > 0:
                starts[worker].append(start)
                seconds = {name: round(value, 2) for name, value in asdict(start).items()}
                results.add({**setup, "worker": worker, **seconds})

    ours, other = (medians(starts[worker]) for worker in WORKERS)
    phases_s = (ours.imported_s, ours.loaded_s, ours.first_pictures_s, ours.rest_s)
    table = [
        ("median of", "ready", "CPU time", "imports", "loading", "first pictures", "the rest"),
        ("sdxl-worker", *(f"{value:.1f} s" for value in (ours.ready_s, ours.cpu_s, *phases_s))),
        ("straightforward", f"{other.ready_s:.1f} s", f"{other.cpu_s:.1f} s", *"----"),
    ]
    print(common.markdown_table(table))
    print(
        f"ratio {ours.ready_s / other.ready_s:.2f} (target: at most {TARGET_RATIO}), "
        f"of CPU time {ours.cpu_s / other.cpu_s:.2f}"
    )
    chart(ours, other, results.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
