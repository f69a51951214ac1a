"""How many jobs a minute, and how long each takes, for WORKER_CONCURRENCY and workers.

Real worker processes on the local endpoint, with the embedded model: all jobs are sent at once, and
the clock of each runs from there.

    python -m benchmarks.throughput --jobs 30
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks import common
from local_endpoint.local import LocalEndpoint

PROMPT = "a red circle on a blue background"
COLUMNS = ("workers", "worker_concurrency", "jobs", "jobs_per_minute", "execution_s", "wait_s")


@dataclass(frozen=True)
class Result:
    jobs_per_minute: float
    execution_ms: float
    """Median of what the platform bills and its execution timeout counts: from take to result."""
    waited_ms: float
    """Median from the request to the take."""


def threads_of_each(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


def measure(*, workers: int, concurrency: int, jobs: int) -> Result:
    environment = {
        "WORKER_CONCURRENCY": str(concurrency),
        "OMP_NUM_THREADS": str(threads_of_each(workers)),
    }
    with LocalEndpoint(workers=workers, environment=environment) as endpoint:
        for _ in range(2 * workers):  # what only the first jobs cost
            endpoint.wait(endpoint.run({"prompt": PROMPT, "seed": 0}))
        started = time.monotonic()
        job_ids = [endpoint.run({"prompt": PROMPT, "seed": seed}) for seed in range(jobs)]
        answers = [endpoint.wait(job_id, timeout_seconds=600) for job_id in job_ids]
        seconds = time.monotonic() - started
    failed = [answer for answer in answers if answer["status"] != "COMPLETED"]
    if failed:
        raise RuntimeError(f"{len(failed)} jobs failed, the first with {failed[0]}")
    return Result(
        jobs_per_minute=60 * jobs / seconds,
        execution_ms=statistics.median(answer["executionTime"] for answer in answers),
        waited_ms=statistics.median(answer["delayTime"] for answer in answers),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=30, help="for each row (default: 30)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    machine = common.machine()
    results = common.CsvFile(arguments.out / "throughput.csv", [*machine, *COLUMNS])
    rows = [(workers, one) for workers in arguments.workers for one in arguments.concurrency]
    for workers, concurrency in tqdm(rows, unit="row"):
        result = measure(workers=workers, concurrency=concurrency, jobs=arguments.jobs)
        figures = (
            round(result.jobs_per_minute, 1),
            round(result.execution_ms / 1000, 2),
            round(result.waited_ms / 1000, 2),
        )
        values = (workers, concurrency, arguments.jobs, *figures)
        row = dict(zip(COLUMNS, values, strict=True))
        results.add({**machine, "threads": threads_of_each(workers), **row})
    report(results.path)


def report(path: Path) -> None:
    """Print a CSV as a table and draw its chart."""
    rows = common.read_csv(path)
    print(common.markdown_table([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]))
    common.bar_chart(
        path.with_suffix(".png"),
        f"Jobs a minute, workers x WORKER_CONCURRENCY, {rows[0]['device']}",
        "jobs a minute",
        [f"{row['workers']} x {row['worker_concurrency']}" for row in rows],
        {"jobs": [float(row["jobs_per_minute"]) for row in rows]},
    )


if __name__ == "__main__":
    main()
