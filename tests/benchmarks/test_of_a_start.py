"""Starts, passes and readings, each measured once with the embedded model."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, page_cache, passes, start_without_sdk, ways_to_read
from benchmarks.start_without_sdk import figures
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.placement import Placement
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings


def run(module: object, out: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Its exit status."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        module.main()  # type: ignore[attr-defined]
    return int(ended.value.code or 0)


def test_a_start_tells_its_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--modes", "none", "--caches", "warm", "--repeats", "1")
    assert run(start_without_sdk, tmp_path, *options, monkeypatch=monkeypatch) == 0
    [row] = common.read_csv(tmp_path / "start-cpu.csv")
    assert (row["COMPILE"], row["page_cache"], row["note"]) == ("none", "warm", "")
    phases = ("imported_s", "base_loaded_s", "base_picture_s", "refiner_loaded_s")
    assert all(float(row[name]) >= 0 for name in (*phases, "refiner_picture_s"))
    assert float(row["imported_s"]) > 0
    assert float(row["first_job_s"]) > 0
    assert 0 < sum(float(row[name]) for name in phases) < float(row["ready_s"])


def test_a_start_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "nowhere"))
    options = ("--modes", "none", "--caches", "warm", "--repeats", "1")
    assert run(start_without_sdk, tmp_path, *options, monkeypatch=monkeypatch) == 1
    [row] = common.read_csv(tmp_path / "start-cpu.csv")
    assert row["note"].startswith("the worker did not become ready, and ended with status ")
    assert row["ready_s"] == ""


def test_the_second_of_a_kind_is_the_refiner_s() -> None:
    lines = [
        {"message": "drew a first picture in 2.0 s", "seconds": 2},
        {"message": "drew a first picture in 1.0 s", "seconds": 1},
        {"message": "drew the first job", "seconds": 3, "peak_memory_mb": 7},
        {"message": "something else", "seconds": 9},
    ]
    expected = {"base_picture_s": 2, "refiner_picture_s": 1, "first_job_s": 3}
    assert figures(lines) == {**expected, "peak_memory_mb": 7}


def test_passes_tell_the_host_s_share_and_what_a_gpu_is_needed_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CALLS", 1)
    monkeypatch.setattr(passes, "IN_A_ROW", 1)
    assert run(passes, tmp_path, "--rows", "2", "--size", "64", monkeypatch=monkeypatch) == 0
    rows = common.read_csv(tmp_path / "passes-cpu.csv")
    assert [(row["network"], row["way"]) for row in rows] == [
        (network, way) for network in ("base", "refiner") for way in passes.WAYS
    ]
    for row in rows:
        assert int(row["operations"]) > 100
        if row["way"] == "eager":
            assert float(row["host_ms"]) > 0
            assert float(row["host_share"]) > 0
        else:
            assert row["note"].endswith("a GPU is needed")


def test_each_way_reads_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(ways_to_read, tmp_path, monkeypatch=monkeypatch) == 0
    rows = common.read_csv(tmp_path / "reading-cpu.csv")
    assert [(row["page_cache"], row["way"]) for row in rows] == [
        (cache, way) for cache in ("cold", "warm") for way in ways_to_read.WAYS
    ]
    for row in rows:
        if row["way"] == "prefetch":
            assert row["note"].startswith("not measured: ")
        else:
            assert float(row["seconds"]) > 0
            assert float(row["gigabytes"]) > 0.005


def test_what_is_read_into_pinned_buffers_are_the_files_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ways_to_read, "PART_BYTES", 3 * 2**16)
    monkeypatch.setattr(ways_to_read, "CHUNK_BYTES", 2**16)
    found = find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR))
    placement = Placement(torch.device("cpu"), torch.float32, resident=True)
    source = ways_to_read.Source(found, found.weight_files("float16"), placement)
    read = ways_to_read.pinned(source)
    assert set(read) == set(source.paths)
    for path, tensor in read.items():
        assert tensor.numpy().tobytes() == path.read_bytes()


def test_files_that_were_just_read_are_in_the_page_cache() -> None:
    path = EMBEDDED_MODEL_DIR / "base" / "model_index.json"
    path.read_bytes()
    assert page_cache.share_kept([path]) in (1.0, None)
    page_cache.forget([path])  # another process may read it at once
