"""What the lossy settings cost and spare."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    common,
    lossy,
)


@pytest.fixture(scope="module")
def lossy_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    out = tmp_path_factory.mktemp("results")
    command = ["lossy", "--rows", *lossy.ROWS[1:], "--count", "1", "--size", "64", "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "--out", str(out)])
        lossy.main()
    assert (out / "lossy-embedded.png").read_bytes().startswith(b"\x89PNG")
    return {row["row"]: row for row in common.read_csv(out / "lossy-embedded.csv")}


def test_each_lossy_setting_is_compared_with_none(lossy_rows: dict[str, dict[str, str]]) -> None:
    none, *others = lossy_rows.values()
    assert tuple(lossy_rows) == lossy.ROWS
    assert none["psnr_db"] == "99.0"
    for row in others:
        assert 10 < float(row["psnr_db"]) < 99, row["row"]
        assert float(row["picture_s"]) > 0
        assert float(row["iou"]) > 0
    psnr = {name: float(row["psnr_db"]) for name, row in lossy_rows.items()}
    assert psnr["int8"] > psnr["fp8"]
    assert psnr["step_cache_2"] > psnr["step_cache_5"]
    assert psnr["guidance_end_0.8"] > psnr["guidance_end_0.4"]
    assert psnr["fp16"] > psnr["fp16_accumulation"] > psnr["int8"]


def test_what_a_lossy_setting_spares_at_full_size_stands_beside_it(
    lossy_rows: dict[str, dict[str, str]],
) -> None:
    assert lossy_rows["step_cache_2"]["share_of_tflop"] == "0.569"
    assert lossy_rows["guidance_end_0.6"]["share_of_tflop"] == "0.804"
    columns = ("base_in_8_bits", "refiner_in_8_bits", "base_speedup_limit", "refiner_speedup_limit")
    for name, row in lossy_rows.items():
        figures = [row[column] for column in (*columns, "saved_gb")]
        if name in ("int8", "fp8"):
            assert figures == ["0.625", "0.489", "1.455", "1.324", "3.07"]
            assert row["share_of_tflop"] == "1.0"
        else:
            assert figures == [""] * 5


def test_psnr_is_told_by_its_mean_its_median_and_its_lower_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(*_: Any, **__: Any) -> dict[str, lossy.Drawn]:
        psnr = [30.0] * 18 + [12.0, 10.0]
        return {"none": lossy.Drawn([2.0], [99.0] * 20), "int8": lossy.Drawn([3.0], psnr)}

    monkeypatch.setattr(lossy, "measure", measured)
    monkeypatch.setattr(lossy, "computed", lambda: {"none": {}, "int8": {}})
    monkeypatch.setattr(sys, "argv", ["lossy", "--count", "20", "--out", str(tmp_path)])
    lossy.main()
    _, row = common.read_csv(tmp_path / "lossy-embedded.csv")
    names = ("psnr_db", "psnr_db_median", "psnr_db_p5", "psnr_db_worst", "share_of_seconds")
    assert [row[name] for name in names] == ["28.1", "30.0", "12.0", "10.0", "1.5"]


def test_the_full_size_base_is_on_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lossy, "load_base", lambda weights: weights)
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with lossy.full_size_base() as weights:
            assert weights.placement.device.type == device
