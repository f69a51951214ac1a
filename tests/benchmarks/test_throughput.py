"""Jobs at once: what is sent to which worker, and what is made of the times."""

import contextlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import common, full_size_model, throughput
from benchmarks.throughput import ONE_BY_ONE, TOGETHER, JobInput, Measured, Ratio, Worker
from local_endpoint.local import LocalEndpoint
from sdxl_worker.request import parse_request
from sdxl_worker.settings import load_settings

TINY_WORKER = [sys.executable, "tests/tiny_worker.py"]


@dataclass(frozen=True)
class Fake:
    """In the place of an endpoint: a job takes 2 seconds, with batching 1."""

    worker: Worker
    workers: int

    def send(self, jobs: Sequence[JobInput], at_s: Sequence[float] | None) -> Measured:
        seconds = (1 if self.worker.batch_jobs > 1 else 2) / self.workers
        if at_s is not None:
            seconds = at_s[-1] / len(jobs)
        return Measured(seconds * len(jobs), [0.5] * len(jobs), [seconds] * len(jobs))


@dataclass(frozen=True)
class Sent:
    to: Fake
    jobs: Sequence[JobInput]
    at_s: Sequence[float] | None


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    result = []

    @contextlib.contextmanager
    def ready(worker: Worker, _: list[int], *, workers: int = 1) -> Iterator[Fake]:
        yield Fake(worker, workers)

    def send(
        endpoint: Fake, jobs: Sequence[JobInput], at_s: Sequence[float] | None = None
    ) -> Measured:
        result.append(Sent(endpoint, jobs, at_s))
        return endpoint.send(jobs, at_s)

    monkeypatch.setattr(throughput, "ready", ready)
    monkeypatch.setattr(throughput, "send", send)
    return result


def rows_of(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> list[dict[str, str]]:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arguments = ["--jobs", "6", "--arrivals", "5", "--pairs", "4", "--out", str(folder), *more]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments])
    throughput.main()
    assert (folder / "throughput.png").read_bytes().startswith(b"\x89PNG")
    return common.read_csv(folder / "throughput.csv")


@pytest.mark.usefixtures("sent")
def test_each_load_and_worker_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = rows_of(monkeypatch, tmp_path)
    names = ("load", "workers", "batch_jobs", "worker_concurrency", "jobs")
    held = [("1", "1"), ("1", "2"), ("1", "8"), ("2", "1"), ("4", "1"), ("8", "1")]
    of_both = [("1", "8"), ("8", "1")]
    assert [tuple(row[name] for name in names) for row in rows] == [
        *(("equal", "1", *one, "12") for one in held),
        *(("mix", "1", *one, "12") for one in held),
        *(("lone", "1", *one, "4") for one in of_both),
        *((load, "1", *one, "5") for load in ("50%", "90%", "150%") for one in of_both),
        *(("equal", "2", *one, "6") for one in [("1", "1"), ("8", "1")]),
    ]
    assert {row["threads"] for row in rows if row["workers"] == "1"} == {"2"}
    assert {row["threads"] for row in rows if row["workers"] == "2"} == {"1"}
    assert rows[0]["date"]


@pytest.mark.usefixtures("sent")
def test_rates_and_ratios_are_those_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = rows_of(monkeypatch, tmp_path)
    by = {(row["load"], row["workers"], row["batch_jobs"]): row for row in rows}
    assert by["equal", "1", "1"]["jobs_per_minute"] == "30.0"
    assert by["equal", "2", "8"]["jobs_per_minute"] == "120.0"
    for load in ("equal", "mix"):
        row = by[load, "1", "8"]
        assert [row[name] for name in ("ratio", "ratio_low", "ratio_high")] == ["2.0"] * 3
    assert by["equal", "1", "1"]["ratio"] == "1.0"
    assert by["lone", "1", "8"]["ratio"] == "0.5", "of the execution times"
    assert by["150%", "1", "8"]["ratio"] == ""


def test_jobs_arrive_at_shares_of_what_one_by_one_does_and_at_the_same_times_for_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: list[Sent]
) -> None:
    rows_of(monkeypatch, tmp_path)
    in_time = [one for one in sent if one.at_s is not None]
    assert [one.to.worker for one in in_time] == [ONE_BY_ONE, TOGETHER] * 3
    for i, share in ((0, 0.5), (2, 0.9), (4, 1.5)):
        assert in_time[i].at_s == in_time[i + 1].at_s
        assert in_time[i].at_s == throughput.arrivals(5, share * 30, seed=i // 2)


def test_a_round_is_done_by_all_workers_before_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: list[Sent]
) -> None:
    rows_of(monkeypatch, tmp_path)
    at_once = [one for one in sent if one.at_s is None and len(one.jobs) == 6]
    of_a_round = [worker for worker in throughput.WORKERS for _ in ("equal", "mix")]
    assert [one.to.worker for one in at_once[:24]] == 2 * of_a_round
    first, second = (one.jobs for one in (at_once[1], at_once[13]))
    assert first != second, "each round has an order of its own"
    assert first == at_once[3].jobs, "but all workers have the same"


def test_lone_jobs_alternate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: list[Sent]
) -> None:
    rows_of(monkeypatch, tmp_path)
    lone = [one for one in sent if len(one.jobs) == 1]
    assert [one.to.worker for one in lone] == [ONE_BY_ONE, TOGETHER, TOGETHER, ONE_BY_ONE] * 2
    assert [one.jobs[0]["seed"] for one in lone] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_full_size_model_draws_in_its_own_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: list[Sent]
) -> None:
    @contextlib.contextmanager
    def model_dir(name: str) -> Iterator[dict[str, str]]:
        yield {"MODEL_DIR": name}

    monkeypatch.setattr(full_size_model, "model_dir", model_dir)
    monkeypatch.setenv("MODEL_DIR", "")
    rows_of(monkeypatch, tmp_path, "--model", "full")
    assert os.environ["MODEL_DIR"] == "full", "which the workers inherit"
    assert {one.jobs[0]["width"] for one in sent[::2]} == {1024}, "equal jobs come first"
    assert {job["width"] for job in sent[1].jobs} == {768, 1024, 1280}


def test_where_other_processes_compete_the_threads_can_be_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert throughput.threads_of_each(2) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert throughput.threads_of_each(2) == 4


def test_a_worker_has_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for worker in throughput.WORKERS:
        for name, value in worker.environment.items():
            monkeypatch.setenv(name, value)
        settings = load_settings()
        assert settings.batch_jobs == worker.batch_jobs
        assert settings.worker_concurrency == worker.worker_concurrency
        if worker == TOGETHER:
            assert settings.jobs_at_once == ONE_BY_ONE.worker_concurrency


def test_the_mix_has_three_sizes_and_two_samplers_equally_often() -> None:
    jobs = throughput.mixed_jobs(24, 128, seed=3)
    requests = [parse_request(one) for one in jobs]
    kinds = Counter((one.width, one.height, one.scheduler) for one in requests)
    sides = (96, 128, 160)
    assert kinds == {(side, side, name): 4 for side in sides for name in ("DDIM", "K_EULER")}
    assert len({one.seed for one in requests}) == 24
    assert jobs == throughput.mixed_jobs(24, 128, seed=3)
    assert jobs != throughput.mixed_jobs(24, 128, seed=4)


def test_arrivals_are_at_random_and_as_many_as_told() -> None:
    at_s = throughput.arrivals(1000, 60, seed=1)
    assert at_s == sorted(at_s) == throughput.arrivals(1000, 60, seed=1)
    assert 950 < at_s[-1] <= 1000
    gaps = [later - earlier for earlier, later in itertools.pairwise(at_s)]
    # Of a Poisson process, the gaps are as often longer than their mean as e says.
    assert sum(gap > 1 for gap in gaps) == pytest.approx(1000 / 2.718, rel=0.1)


def pair(one_by_one: float, together: float) -> tuple[Measured, Measured]:
    return Measured(1, [0], [one_by_one]), Measured(1, [0], [together])


def test_the_ratio_of_pairs_is_their_median_and_where_it_may_lie() -> None:
    ratios = [0.5, 2.0, *(1 + i / 100 for i in range(-9, 9))]
    found = throughput.ratio_of_pairs([pair(2.0, 2.0 * ratio) for ratio in ratios])
    # Of 20, the 6th and the 15th: the sign test's interval.
    assert (found.middle, found.low, found.high) == pytest.approx((0.995, 0.95, 1.04))


def test_the_ratio_of_rounds_compares_each_with_its_own() -> None:
    slow, quick = Measured(20, [0], [1]), Measured(10, [0], [1])
    found = throughput.ratio_of_rounds([quick, slow, quick], [slow, slow, slow])
    assert found == Ratio(2, 1, 2)


def test_a_row_has_medians_and_95th_percentiles() -> None:
    rounds = [
        Measured(30, list(range(51)), [1.0] * 51),
        Measured(30, list(range(51, 101)), [1.0] * 50),
    ]
    row = throughput.row("equal", TOGETHER, rounds)
    assert row["jobs"] == 101
    assert row["jobs_per_minute"] == 101
    names = ("wait_s", "wait_p95_s", "execution_s", "execution_p95_s", "answer_s", "answer_p95_s")
    assert [row[name] for name in names] == [50, 95, 1, 1, 51, 96]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LocalEndpoint]:
    with LocalEndpoint(worker_command=TINY_WORKER) as running:
        yield running


def test_jobs_are_sent_at_their_times(endpoint: LocalEndpoint) -> None:
    jobs: list[JobInput] = [{"sleep_seconds": 0.3}, {"sleep_seconds": 0}]
    found = throughput.send(endpoint, jobs, [0.0, 2.0])
    assert found.executed_s[0] >= 0.3
    assert found.seconds >= 2
    assert found.waited_s[1] < 0.3, "the worker asks for jobs again by then"
    assert found.jobs_per_minute == pytest.approx(120 / found.seconds)
    at_once = throughput.send(endpoint, jobs)
    assert at_once.waited_s[1] >= 0.3, "it waits for the first"


def test_a_job_that_fails_ends_the_run(endpoint: LocalEndpoint) -> None:
    with pytest.raises(RuntimeError, match=r"1 jobs failed, the first with .*no picture"):
        throughput.send(endpoint, [{"sleep_seconds": 0}, {"raise": "no picture"}])
