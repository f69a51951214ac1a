"""client/progress_bar.py: what is told of a job, with a clock of the tests'."""

import base64
import io
import math
from typing import Any

import pytest
from rich.console import Console

from client.progress_bar import JobProgress, LineDisplay, make_display, printable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def in_progress(**progress: Any) -> dict[str, Any]:
    return {"status": "IN_PROGRESS", "output": {"progress": progress}}


def step(number: int, percent: int) -> dict[str, Any]:
    return in_progress(stage="base", step=number, steps=25, percent=percent)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def job(clock: Clock) -> JobProgress:
    return JobProgress(clock=clock)


def test_the_queue_has_its_own_seconds(job: JobProgress, clock: Clock) -> None:
    clock.now += 5
    job.update({"status": "IN_QUEUE"})
    clock.now += 12
    job.update({"status": "IN_QUEUE"})
    assert job.text() == "in the queue, position unknown: 12 s"
    clock.now += 60
    assert job.text() == "in the queue, position unknown: 1 min 12 s"
    job.update({"status": "IN_PROGRESS"})
    assert job.text() == "at a worker: 0 s"


def test_the_time_left_follows_the_steps_rate(job: JobProgress, clock: Clock) -> None:
    job.update(step(2, 10))
    assert job.text() == "base, step 2/25", "one step tells no rate"
    clock.now += 4
    job.update(step(7, 30))
    assert job.text() == "base, step 7/25, 14 s left"
    clock.now += 3
    assert job.text() == "base, step 7/25, 11 s left"
    clock.now += 100
    assert job.seconds_left() == 0
    assert job.percent == 30


def test_loading_and_downloading_are_told(job: JobProgress, clock: Clock) -> None:
    job.update(in_progress(stage="loading", model="dreamshaper"))
    clock.now += 3
    assert job.text() == "loading the model dreamshaper: 3 s"
    job.update(in_progress(stage="download", bytes=12_000_000, total_bytes=None))
    assert job.text() == "downloading, 12 MB: 0 s"
    job.update(in_progress(stage="download", bytes=20_000_000, total_bytes=40_000_000, percent=50))
    assert job.text() == "downloading, 20 MB of 40 MB"
    job.update(step(1, 4))
    assert job.percent == 4, "the download's rate is not the steps'"
    assert job.seconds_left() is None


def test_a_job_that_comes_back_to_the_queue_begins_anew(job: JobProgress) -> None:
    job.update(step(20, 80))
    job.update({"status": "IN_QUEUE"})
    assert job.percent is None


@pytest.mark.parametrize(
    "output",
    [
        None, 7, "text", [], {"progress": 7}, {"progress": {}}, {"progress": {"percent": "x"}},
        {"progress": {"stage": 7, "percent": True}}, {"progress": {"percent": 1e9}, "preview": "!"},
        {"progress": {"stage": "download", "bytes": "many"}}, {"progress": {"percent": 10**400}},
        {"progress": {"stage": "download", "bytes": 10**400}}, {"progress": {"percent": math.nan}},
        {"progress": {"percent": 5e-324}},
    ],
)  # fmt: skip
def test_whatever_progress_is_it_is_survived(output: Any, job: JobProgress, clock: Clock) -> None:
    job.update(step(1, 0))
    clock.now += 3
    job.update({"status": "IN_PROGRESS", "output": output})
    assert job.text()
    assert job.percent is None or 0 <= job.percent <= 100


def test_a_preview_is_kept(job: JobProgress) -> None:
    uri = "data:image/jpeg;base64," + base64.b64encode(b"jpeg").decode()
    job.update({"status": "IN_PROGRESS", "output": {"progress": {"stage": "base"}, "preview": uri}})
    assert job.preview == b"jpeg"


def test_without_a_terminal_a_line_is_said_for_each_stage() -> None:
    file = io.StringIO()
    display = LineDisplay(Console(file=file, width=100))
    job = JobProgress()
    display.add(job)
    for answer in ({"status": "IN_QUEUE"}, {"status": "IN_QUEUE"}, step(1, 4), step(2, 8)):
        job.update(answer)
        display.changed(job)
    assert file.getvalue() == "in the queue, position unknown: 0 s\nbase, step 1/25\n"


@pytest.mark.parametrize(
    ("variables", "preview", "shown"),
    [
        ({"COLORTERM": "truecolor"}, None, True),
        ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, None, False),
        ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, True, True),
        ({"COLORTERM": ""}, None, False),
    ],
)
def test_pictures_are_shown_where_there_are_colours_for_them(
    variables: dict[str, str], preview: bool | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    assert make_display(quiet=False, preview=preview).shows_pictures == shown


def test_nothing_that_is_shown_controls_the_terminal() -> None:
    assert printable("a\x1b[2J\r\u202eb\u009bc\nd") == "a\ufffd[2J\ufffd\ufffdb\ufffdc\nd"
