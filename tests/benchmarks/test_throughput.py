"""Jobs at once."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks import (
    common,
    throughput,
)


def test_throughput_is_written_row_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(*, workers: int, concurrency: int, jobs: int) -> throughput.Result:
        return throughput.Result(30.25 * workers * concurrency, 100.0 * jobs, 7_500.0)

    monkeypatch.setattr(throughput, "measure", measured)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["throughput", "--jobs", "5", "--out", str(tmp_path)])
    throughput.main()
    rows = common.read_csv(tmp_path / "throughput.csv")
    names = ("workers", "worker_concurrency", "threads", "jobs_per_minute")
    assert [[row[name] for name in names] for row in rows] == [
        ["1", "1", "2", "30.2"],
        ["1", "2", "2", "60.5"],
        ["2", "1", "1", "60.5"],
        ["2", "2", "1", "121.0"],
    ]
    assert {(row["jobs"], row["execution_s"], row["wait_s"]) for row in rows} == {
        ("5", "0.5", "7.5")
    }
    assert rows[0]["date"]
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
