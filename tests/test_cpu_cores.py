"""Threads follow what the container may use, not the cores of its host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_worker.cpu_cores import VARIABLES, cores
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
from pathlib import Path
from sdxl_worker import cpu_cores
cpu_cores.ROOT = Path(sys.argv[1])
import handler

def start(*_, **__):
    assert "torch" not in sys.modules
    import torch
    from torch._inductor import config
    onnx = os.environ.get("ORT_INTRA_OP_NUM_THREADS")
    print(torch.get_num_threads(), config.compile_threads, onnx, flush=True)
    os._exit(0)

handler.start = start
sys.argv[1:] = ["--serve"]
handler.main()
"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, "1 1 1"), ({"OMP_NUM_THREADS": ""}, "1 1 1"), ({"OMP_NUM_THREADS": "2"}, "2 1 1")],
)
def test_a_worker_s_libraries_follow_unless_the_owner_says_otherwise(
    said: dict[str, str], expected: str, tmp_path: Path
) -> None:
    assert worker(version_2(tmp_path, "100000 100000"), said) == expected


def test_without_a_quota_they_are_left_to_themselves(tmp_path: Path) -> None:
    assert worker(tmp_path, {"OMP_NUM_THREADS": "2"}).endswith(" None")


def worker(root: Path, said: dict[str, str]) -> str:
    """Threads of torch, of its compiler, and of onnxruntime as it is told."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(root)],
        cwd=REPOSITORY,
        env=environment | said,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]
