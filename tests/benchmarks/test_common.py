"""What the benchmarks share."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import (
    common,
)

PROGRAMS = ("coldstart", "lossy", "memory", "overhead", "pictures", "throughput")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_describes_itself(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{program}").main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{program}" in capsys.readouterr().out


def test_results_are_complete_after_each_row(tmp_path: Path) -> None:
    results = common.CsvFile(tmp_path / "results.csv", ["a", "b"])
    results.add({"a": 1})
    shutil.copy(results.path, tmp_path / "cut-off.csv")
    results.add({"a": 2, "b": 3})
    assert common.read_csv(tmp_path / "cut-off.csv") == [{"a": "1", "b": ""}]
    assert len(common.read_csv(results.path)) == 2
