"""Pictures, row by row: what is timed, and what it is compared with."""

import functools
import math
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import (
    common,
    pictures,
    ways,
)
from sdxl_worker.speed.optimize import OPTIMIZATIONS


def quick_options(out: Path, *rows: str, batch: int = 1) -> pictures.Options:
    """Of the embedded model; 2 steps of the base and 2 of the refiner."""
    return pictures.Options(
        device=torch.device("cpu"),
        dtype=torch.float32,
        model="embedded",
        rows=rows,
        sizes=[(64, 64)],
        batches=[batch],
        base_steps=2,
        refiner_steps=7,
        repeats=1,
        out=out,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    options = quick_options(
        tmp_path_factory.mktemp("results"),
        "2.1.0",
        "diffusers",
        "worker",
        "fuse_qkv",
        "graphs",
        batch=2,
    )
    path = pictures.run(options)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return {row["row"]: row for row in common.read_csv(path)}


def test_each_row_tells_what_was_measured_and_on_what(rows: dict[str, dict[str, str]]) -> None:
    assert list(rows) == ["2.1.0", "diffusers", "worker", "fuse_qkv", "graphs"]
    for row in rows.values():
        assert {"date", "device", "torch", "diffusers", *OPTIMIZATIONS} <= row.keys()
        assert (row["batch"], row["base_steps"], row["refiner_steps"]) == ("2", "2", "2")
    measured = [row for name, row in rows.items() if name != "graphs"]
    for row in measured:
        for column in ("picture_ms", "base_step_ms", "refiner_step_ms", "encode_ms", "tflop"):
            assert math.isfinite(float(row[column]))
            assert float(row[column]) > 0
        steps = float(row["step_ms"])
        assert steps == pytest.approx(float(row["picture_ms"]) / 4, rel=0.01)
    assert [name for name in OPTIMIZATIONS if rows["fuse_qkv"][name] == "1"] == [
        "channels_last",
        "fuse_qkv",
    ]


def test_what_the_machine_cannot_do_is_not_measured(rows: dict[str, dict[str, str]]) -> None:
    assert rows["graphs"]["note"] == "not measured: cuda_graphs: a GPU is needed"
    assert rows["graphs"]["picture_ms"] == ""


def test_the_same_picture_is_timed_in_every_row_but_that_of_2_1_0(
    rows: dict[str, dict[str, str]],
) -> None:
    assert rows["worker"]["psnr_db"] == "99.0"
    assert float(rows["diffusers"]["psnr_db"]) > 45
    assert float(rows["fuse_qkv"]["psnr_db"]) > 45
    assert float(rows["2.1.0"]["psnr_db"]) < 45


def test_figures_are_those_of_the_time_and_the_operations(rows: dict[str, dict[str, str]]) -> None:
    for row in (row for row in rows.values() if row["picture_ms"]):
        picture_ms, encode_ms, tflop, reached, limit, share, answer_ms = (
            float(row[column])
            for column in (
                *("picture_ms", "encode_ms", "tflop", "tflop_per_s", "limit_tflop_per_s"),
                *("share_of_limit", "answer_ms"),
            )
        )
        assert reached == pytest.approx(1000 * tflop / picture_ms, rel=0.1)
        assert share == pytest.approx(reached / limit, abs=0.05)
        assert answer_ms == pytest.approx(picture_ms + encode_ms, abs=0.2)


def test_the_limit_is_two_operations_for_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures.Clock, "ms", lambda *_: 2.0)
    limit = pictures.matmul_tflop_per_s(torch.device("cpu"), torch.float32)
    assert limit == pytest.approx(2 * 1024**3 / 0.002 / 1e12)


def test_answers_are_compared_with_those_of_2_1_0(
    rows: dict[str, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = rows["worker"].keys()
    results = common.CsvFile(tmp_path / "pictures.csv", columns)
    results.add(rows["2.1.0"] | {"answer_ms": "800"})
    results.add(rows["worker"] | {"answer_ms": "200"})
    pictures.report(results.path)
    of_210, ours = capsys.readouterr().out.splitlines()[2:4]
    assert of_210.endswith("| 1.00 times as fast |")
    assert ours.endswith("| 4.00 times as fast |")


def test_a_row_that_fails_does_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory.\nMore of it")

    monkeypatch.setattr(pictures, "OTHER_ROWS", {"2.1.0": fails})
    options = quick_options(tmp_path, "2.1.0", "worker")
    broken, fine = common.read_csv(pictures.run(options))
    assert broken["note"] == "not measured: RuntimeError: CUDA out of memory."
    assert float(fine["picture_ms"]) > 0


def test_a_row_begins_with_no_model_of_another_and_nothing_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or a row's peak memory and first picture would be in part another's."""
    drawn: list[Any] = []
    caches: list[tuple[str | None, str | None]] = []

    class Graphs(ways.Worker):
        def __init__(self, models: Any, *more: Any) -> None:
            assert not [unet() for unet in drawn if unet() is not None]
            super().__init__(models, *more)
            unet = models.unet
            unet.forward = functools.partial(unet.forward)  # a circle, as a CUDA graph makes one
            drawn.append(weakref.ref(unet))
            caches.append(
                (os.environ.get("TORCHINDUCTOR_CACHE_DIR"), os.environ.get("TRITON_CACHE_DIR"))
            )

    monkeypatch.setattr(pictures, "Worker", Graphs)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    options = quick_options(tmp_path, "worker", "channels_last")
    rows = common.read_csv(pictures.run(options))
    assert all(row["picture_ms"] for row in rows)
    assert len(drawn) == 3
    _, *of_rows = caches
    assert len({folder for both in of_rows for folder in both} - {None}) == 4
    assert not any(Path(folder or "/").exists() for both in of_rows for folder in both)


@pytest.mark.parametrize(
    ("row", "device", "compiler", "reason"),
    [
        ("worker", "cpu", None, ""),
        ("compile_full", "cpu", "/usr/bin/c++", ""),
        ("compile_full", "cpu", None, "compiling needs a C++ compiler"),
        ("compile_full", "cuda", None, ""),
        ("full+fp8", "cpu", "/usr/bin/c++", "cuda_graphs and fp8: a GPU is needed"),
        ("full+fp8", "cuda", "/usr/bin/c++", ""),
        ("flash_attention", "cpu", None, "flash_attention: a GPU is needed"),
    ],
)
def test_a_row_says_why_it_cannot_be_measured(
    row: str, device: str, compiler: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures.shutil, "which", lambda _: compiler)
    assert pictures.why_not(row, torch.device(device)) == reason


def test_pictures_that_are_empty_are_no_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every row would be equal to it."""
    monkeypatch.setattr(ways.Worker, "draw", lambda *_: [Image.new("RGB", (64, 64), "black")])
    options = quick_options(tmp_path, "worker")
    with pytest.raises(RuntimeError, match="empty picture"):
        pictures.run(options)


def test_pictures_count_the_operations_of_a_step_cache(tmp_path: Path) -> None:
    options = quick_options(tmp_path, "channels_last", "step_cache_2")
    whole, cached = common.read_csv(pictures.run(options))
    assert (whole["step_cache"], cached["step_cache"]) == ("0", "2")
    assert float(cached["tflop"]) < float(whole["tflop"])
    assert float(cached["psnr_db"]) < float(whole["psnr_db"])
