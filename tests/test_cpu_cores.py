"""Threads follow what the container may use, not the cores of its host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_worker.cpu_cores import THREADS, cores
from tests.support import REPOSITORY


def version_2(root: Path, text: str) -> Path:
    (root / "cpu.max").write_text(text)
    return root


def version_1(root: Path, quota: str, period: str = "100000\n") -> Path:
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (root / "cpu" / "cpu.cfs_period_us").write_text(period)
    return root


@pytest.fixture(autouse=True)
def _on_64_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("400000 100000\n", 4),
        ("250000 100000\n", 3),
        ("50000 100000\n", 1),
        ("12800000 100000\n", 64),
        ("max 100000\n", 64),
        ("", 64),
        ("0 0\n", 64),
    ],
)
def test_the_quota_of_version_2(text: str, expected: int, tmp_path: Path) -> None:
    assert cores(version_2(tmp_path, text)) == expected


@pytest.mark.parametrize(("quota", "expected"), [("400000\n", 4), ("-1\n", 64), ("junk", 64)])
def test_the_quota_of_version_1(quota: str, expected: int, tmp_path: Path) -> None:
    assert cores(version_1(tmp_path, quota)) == expected


def test_without_a_control_group_the_cores_that_it_may_run_on_count(tmp_path: Path) -> None:
    assert cores(tmp_path / "nowhere") == 64


# `main`, up to where it would load the models.
WORKER = """
import os, sys
os.sched_getaffinity = lambda _: range(1)
import handler

def start(*_, **__):
    assert "torch" not in sys.modules
    import torch
    print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], flush=True)
    os._exit(0)

handler.start = start
sys.argv[1:] = ["--serve"]
handler.main()
"""


@pytest.mark.parametrize(("said", "expected"), [(None, "1 1"), ("", "1 1"), ("2", "2 2")])
def test_a_worker_s_torch_follows_and_so_do_the_programs_that_it_starts(
    said: str | None, expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != THREADS}
    if said is not None:
        environment[THREADS] = said
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[-2] == expected
