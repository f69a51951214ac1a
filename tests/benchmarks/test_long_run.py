"""`make long-run` in short, and that it tells when a target is missed."""

import json
from pathlib import Path

import pytest

from benchmarks import long_run
from benchmarks.long_run import KINDS, Result, Sample


@pytest.fixture(scope="module")
def result() -> Result:
    """Twice each kind of job, two workers, one of them killed."""
    return long_run.measure(jobs=2 * len(KINDS), kills=1, seed=1, workers=2)


def test_no_job_is_lost_doubled_or_answered_wrongly(result: Result) -> None:
    assert (result.lost, result.doubled, result.wrong) == ([], [], [])
    assert result.kinds == dict.fromkeys(KINDS, 2)
    assert sum(result.statuses.values()) == result.jobs
    assert result.killed == 1


def test_the_first_request_is_answered_the_same_at_the_end(result: Result) -> None:
    assert result.repeats_exactly


def test_other_requests_are_answered_the_same_after_loras_and_models(result: Result) -> None:
    assert result.changed == []
    asked = len(long_run.REPEATED) * 2
    assert asked / 2 - 1 <= result.repeated < asked
    assert result.downloads > 0


def test_nothing_is_left_behind(result: Result) -> None:
    assert result.left_behind == []


def test_the_worker_is_watched(result: Result, tmp_path: Path) -> None:
    assert [one.jobs for one in result.samples] == [*range(10, result.jobs + 1, 10)]
    assert all(one.memory_mb > 100 and one.handles > 3 for one in result.samples)
    long_run.write(result, tmp_path / "long_run.json", seed=1)
    assert len(json.loads((tmp_path / "long_run.json").read_text())["samples"]) == 5
    long_run.draw_chart(result, tmp_path / "chart.svg")
    assert "memory, MB" in (tmp_path / "chart.svg").read_text()


def samples(*memory_mb: float) -> list[Sample]:
    return [Sample(100 * i, mb, 16, 8, 2) for i, mb in enumerate(memory_mb, 1)]


class TestAMissedTargetIsTold:
    def good(self) -> Result:
        memory = samples(500, 500, 510, 510, 510)
        return Result(500, repeats_exactly=True, samples=memory)

    def test_none_is_missed_where_all_is_well(self) -> None:
        assert self.good().missed == []

    def test_memory(self) -> None:
        result = self.good()
        result.samples = samples(500, 500, 600, 600, 600)
        assert result.missed == ["memory grew by 20.0%"]

    def test_lost_jobs(self) -> None:
        result = self.good()
        result.lost = ["preview, 1: FAILED"]
        assert result.missed == ["lost: ['preview, 1: FAILED']"]

    def test_another_answer(self) -> None:
        result = self.good()
        result.repeats_exactly = False
        assert result.missed == ["the first request was answered otherwise at the end"]

    def test_an_answer_that_is_not_as_before(self) -> None:
        result = self.good()
        result.changed = ["LoRA, 1"]
        assert result.missed == ["answered otherwise than before: ['LoRA, 1']"]

    def test_what_is_left_behind(self) -> None:
        result = self.good()
        result.left_behind = ["file a"]
        assert result.missed == ["left behind: ['file a']"]
