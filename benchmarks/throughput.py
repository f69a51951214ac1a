"""How many jobs a minute, and how long each waits and executes, with BATCH_JOBS and without.

Real worker processes on the local endpoint, with the embedded model, which takes a quarter of an
hour on two CPU cores, or, on a GPU, with one of SDXL's size and random weights.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --model full
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from tqdm import tqdm

from benchmarks import common, full_size_model
from local_endpoint.local import LocalEndpoint
from local_endpoint.queue import Job, Status
from sdxl_worker.settings import Settings

JobInput = dict[str, Any]

PROMPT = "a red circle on a blue background"
SAMPLERS = ("DDIM", "K_EULER")
# Of the model's native size. The miniature draws well at all three.
SHARES_OF_SIZE = (0.75, 1, 1.25)
# Of the jobs that a worker without batching does, how many arrive.
LOADS = (0.5, 0.9, 1.5)
TIMEOUT_SECONDS = 1200
COLUMNS = (
    "load",
    "workers",
    "batch_jobs",
    "worker_concurrency",
    "jobs",
    "jobs_per_minute",
    "wait_s",
    "wait_p95_s",
    "execution_s",
    "execution_p95_s",
    "answer_s",
    "answer_p95_s",
    "ratio",
    "ratio_low",
    "ratio_high",
)


@dataclass(frozen=True)
class Worker:
    """By its settings."""

    batch_jobs: int = 1
    worker_concurrency: int = 1

    @property
    def environment(self) -> dict[str, str]:
        return {name.upper(): str(value) for name, value in vars(self).items()}


TOGETHER = Worker(batch_jobs=8)
# It holds as many jobs, and draws them one by one.
ONE_BY_ONE = Worker(worker_concurrency=Settings(**vars(TOGETHER)).jobs_at_once)
WORKERS = (Worker(), Worker(1, 2), ONE_BY_ONE, Worker(2), Worker(4), TOGETHER)
WORKERS_IN_TWOS = (Worker(), TOGETHER)


@dataclass(frozen=True)
class Measured:
    """Jobs that were sent in one go."""

    seconds: float
    """From the first one's request to the last one's result."""
    waited_s: list[float]
    """From the request to the take."""
    executed_s: list[float]
    """From the take to the result, which the platform tells as `executionTime`."""

    @property
    def jobs_per_minute(self) -> float:
        return 60 * len(self.waited_s) / self.seconds


@dataclass(frozen=True)
class Ratio:
    """To `ONE_BY_ONE`, and the range that it may be in."""

    middle: float
    low: float
    high: float


def threads_of_each(workers: int) -> int:
    """OMP_NUM_THREADS, or the cores that there are for each."""
    given = os.environ.get("OMP_NUM_THREADS")
    return int(given) if given else max(1, (os.cpu_count() or 1) // workers)


@contextlib.contextmanager
def ready(worker: Worker, sizes_px: Sequence[int], *, workers: int = 1) -> Iterator[LocalEndpoint]:
    """An endpoint whose workers have done what only first jobs cost: for each size, passes of as
    many rows as there may be."""
    environment = {**worker.environment, "OMP_NUM_THREADS": str(threads_of_each(workers))}
    with LocalEndpoint(
        workers=workers, environment=environment, start_timeout_seconds=TIMEOUT_SECONDS
    ) as endpoint:
        for size in sizes_px:
            steps = range(1, 1 + max(2, worker.batch_jobs) * workers)
            jobs = [
                {
                    **job(seed=0, size_px=size),
                    "num_inference_steps": n,
                    "refiner_inference_steps": n,
                    "strength": 1.0,
                }
                for n in steps
            ]
            send(endpoint, jobs)
        yield endpoint


def job(*, seed: int, size_px: int, sampler: str = SAMPLERS[0]) -> JobInput:
    return {
        "prompt": PROMPT,
        "seed": seed,
        "height": size_px,
        "width": size_px,
        "scheduler": sampler,
    }


def equal_jobs(count: int, native_px: int) -> list[JobInput]:
    return [job(seed=seed, size_px=native_px) for seed in range(count)]


def mixed_jobs(count: int, native_px: int, seed: int) -> list[JobInput]:
    """Three sizes and two samplers, equally often, in an order of chance."""
    kinds = [(size, one) for size in sizes_of_mix(native_px) for one in SAMPLERS]
    jobs = []
    for i in range(count):
        size_px, sampler = kinds[i % len(kinds)]
        jobs.append(job(seed=i, size_px=size_px, sampler=sampler))
    return [jobs[i] for i in np.random.default_rng(seed).permutation(count)]


def sizes_of_mix(native_px: int) -> list[int]:
    return [int(share * native_px) for share in SHARES_OF_SIZE]


def arrivals(count: int, per_minute: float, seed: int) -> list[float]:
    """When jobs arrive that come at any time, in seconds: a Poisson process of so many."""
    seconds = 60 * count / per_minute
    return sorted(np.random.default_rng(seed).uniform(0, seconds, count).tolist())


def send(
    endpoint: LocalEndpoint, jobs: Sequence[JobInput], at_s: Sequence[float] | None = None
) -> Measured:
    """Send jobs and wait for their results.

    Args:
        at_s: when to send each, in seconds from now. None: all at once.

    Raises:
        RuntimeError: one failed.
    """
    began = time.monotonic()
    job_ids = set()
    for one, second in zip(jobs, at_s or [0.0] * len(jobs), strict=True):
        time.sleep(max(0.0, began + second - time.monotonic()))
        job_ids.add(endpoint.run(one))
    sent = [one for one in endpoint.jobs if one.id in job_ids]
    while not all(one.is_finished for one in sent):
        if time.monotonic() - began > TIMEOUT_SECONDS:
            raise RuntimeError(f"jobs did not end within {TIMEOUT_SECONDS} s")
        time.sleep(0.01)
    return measured(sent)


def measured(jobs: Sequence[Job]) -> Measured:
    failed = [one.for_client() for one in jobs if one.status is not Status.COMPLETED]
    if failed:
        raise RuntimeError(f"{len(failed)} jobs failed, the first with {failed[0]}")
    submitted = np.array([one.submitted_at for one in jobs])
    taken = np.array([one.taken_at for one in jobs])
    finished = np.array([one.finished_at for one in jobs])
    return Measured(
        seconds=float(finished.max() - submitted.min()),
        waited_s=list(taken - submitted),
        executed_s=list(finished - taken),
    )


def lone_jobs(
    one_by_one: LocalEndpoint, together: LocalEndpoint, pairs: int, native_px: int
) -> list[tuple[Measured, Measured]]:
    """The same job to one and then the other, the other way round each second time. Each is sent
    when the answer to the one before is there."""
    result = []
    for i, one in enumerate(equal_jobs(pairs, native_px)):
        first, second = (one_by_one, together) if i % 2 == 0 else (together, one_by_one)
        both = send(first, [one]), send(second, [one])
        result.append(both if i % 2 == 0 else both[::-1])
    return result


def ratio_of_pairs(pairs: Sequence[tuple[Measured, Measured]]) -> Ratio:
    """Of the execution times: the median, and the range in which that of endless pairs lies with
    95% certainty (from the binomial distribution of how many lie below it)."""
    ratios = sorted(
        together.executed_s[0] / one_by_one.executed_s[0] for one_by_one, together in pairs
    )
    count = len(ratios)
    low = max(0, int(binom.ppf(0.025, count, 0.5)) - 1)
    return Ratio(statistics.median(ratios), ratios[low], ratios[count - 1 - low])


def ratio_of_rounds(rounds: Sequence[Measured], references: Sequence[Measured]) -> Ratio:
    """Of the jobs a minute: the median of rounds, the lowest and the highest."""
    ratios = [
        one.jobs_per_minute / reference.jobs_per_minute
        for one, reference in zip(rounds, references, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def row(
    load: str,
    worker: Worker,
    rounds: Sequence[Measured],
    ratio: Ratio | None = None,
    *,
    workers: int = 1,
) -> dict[str, object]:
    waited = np.concatenate([one.waited_s for one in rounds])
    executed = np.concatenate([one.executed_s for one in rounds])
    seconds = sum(one.seconds for one in rounds)
    figures = [
        round(float(np.percentile(values, percent)), 3)
        for values in (waited, executed, waited + executed)
        for percent in (50, 95)
    ]
    ratios = [""] * 3 if ratio is None else [round(one, 3) for one in vars(ratio).values()]
    jobs_per_minute = round(60 * len(waited) / seconds, 1)
    values = (
        load,
        workers,
        *vars(worker).values(),
        len(waited),
        jobs_per_minute,
        *figures,
        *ratios,
    )
    return dict(zip(COLUMNS, values, strict=True))


@dataclass(frozen=True)
class Options:
    jobs: int
    rounds: int
    arrivals: int
    pairs: int
    native_px: int


def all_at_once(
    options: Options, add: Callable[[dict[str, object]], None], tick: Callable[[], object]
) -> float:
    """Equal jobs and a mix, sent all at once to each worker, in turn, several times over.

    Returns:
        Equal jobs a minute of `ONE_BY_ONE`.
    """
    sizes = sizes_of_mix(options.native_px)
    equal: dict[Worker, list[Measured]] = {worker: [] for worker in WORKERS}
    mixed: dict[Worker, list[Measured]] = {worker: [] for worker in WORKERS}
    for i in range(options.rounds):
        for worker in WORKERS:
            with ready(worker, sizes) as endpoint:
                jobs = equal_jobs(options.jobs, options.native_px)
                equal[worker].append(send(endpoint, jobs))
                jobs = mixed_jobs(options.jobs, options.native_px, seed=i)
                mixed[worker].append(send(endpoint, jobs))
            tick()
    for load, by_worker in (("equal", equal), ("mix", mixed)):
        for worker, rounds in by_worker.items():
            add(row(load, worker, rounds, ratio_of_rounds(rounds, by_worker[ONE_BY_ONE])))
    return statistics.median(one.jobs_per_minute for one in equal[ONE_BY_ONE])


def over_time(
    options: Options,
    capacity: float,
    add: Callable[[dict[str, object]], None],
    tick: Callable[[], object],
) -> None:
    """Jobs that arrive at random, and lone ones."""
    with contextlib.ExitStack() as stack:
        endpoints = {
            worker: stack.enter_context(ready(worker, [options.native_px]))
            for worker in (ONE_BY_ONE, TOGETHER)
        }
        pairs = lone_jobs(
            endpoints[ONE_BY_ONE], endpoints[TOGETHER], options.pairs, options.native_px
        )
        ratio = ratio_of_pairs(pairs)
        for i, worker in enumerate(endpoints):
            of_worker = [pair[i] for pair in pairs]
            add(row("lone", worker, of_worker, ratio if worker is TOGETHER else None))
        tick()
        for i, load in enumerate(LOADS):
            jobs = equal_jobs(options.arrivals, options.native_px)
            at_s = arrivals(options.arrivals, load * capacity, seed=i)
            for worker, endpoint in endpoints.items():
                add(row(f"{load:.0%}", worker, [send(endpoint, jobs, at_s)]))
                tick()


def in_twos(
    options: Options, add: Callable[[dict[str, object]], None], tick: Callable[[], object]
) -> None:
    """Equal jobs, sent all at once to two workers."""
    for worker in WORKERS_IN_TWOS:
        with ready(worker, [options.native_px], workers=2) as endpoint:
            result = send(endpoint, equal_jobs(options.jobs, options.native_px))
        add(row("equal", worker, [result], workers=2))
        tick()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=24, help="sent at once (default: 24)")
    parser.add_argument("--rounds", type=int, default=2, help="of jobs sent at once (default: 2)")
    parser.add_argument(
        "--arrivals", type=int, default=32, help="jobs at random for each load (default: 32)"
    )
    parser.add_argument("--pairs", type=int, default=20, help="of lone jobs (default: 20)")
    parser.add_argument(
        "--model", choices=("full",), default="", help="not given: the embedded one"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()
    options = Options(
        jobs=arguments.jobs,
        rounds=arguments.rounds,
        arrivals=arguments.arrivals,
        pairs=arguments.pairs,
        native_px=1024 if arguments.model == "full" else 128,
    )

    machine = common.machine("cuda" if torch.cuda.is_available() else "cpu")
    results = common.CsvFile(arguments.out / "throughput.csv", [*machine, *COLUMNS])

    def add(figures: dict[str, object]) -> None:
        threads = threads_of_each(int(str(figures["workers"])))
        results.add({**machine, "threads": threads, **figures})

    total = options.rounds * len(WORKERS) + 1 + 2 * len(LOADS) + len(WORKERS_IN_TWOS)
    with full_size_model.model_dir(arguments.model) as variables, tqdm(total=total) as progress:
        os.environ.update(variables)  # which the workers inherit
        capacity = all_at_once(options, add, progress.update)
        over_time(options, capacity, add, progress.update)
        in_twos(options, add, progress.update)
    report(results.path)


def report(path: Path) -> None:
    """Print a CSV as a table and draw its chart."""
    rows = common.read_csv(path)
    print(common.markdown_table([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]))
    at_once = [row for row in rows if row["load"] in ("equal", "mix")]
    common.bar_chart(
        path.with_suffix(".png"),
        f"Jobs a minute, {rows[0]['device']}",
        "jobs a minute",
        [label(row) for row in at_once],
        {"jobs": [float(row["jobs_per_minute"]) for row in at_once]},
    )


def label(row: dict[str, str]) -> str:
    held, drawn = row["worker_concurrency"], row["batch_jobs"]
    told = f"BATCH_JOBS={drawn}" if drawn != "1" else f"WORKER_CONCURRENCY={held}"
    return f"{row['load']}, {told}" + (", 2 workers" if row["workers"] == "2" else "")


if __name__ == "__main__":
    main()
