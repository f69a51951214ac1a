"""FP16_ACCUMULATION: a setting of the whole process, which is told wherever lossy ones are."""

import json
from collections.abc import Iterator

import pytest
import torch

from benchmarks import pictures as benchmark
from sdxl_worker.errors import ModelError
from sdxl_worker.placement import Placement
from sdxl_worker.serving.start import start
from sdxl_worker.settings import Settings
from sdxl_worker.speed.optimize import MODES, optimizations_of, optimize
from tests.support import fresh_models

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    assert not is_on()
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


def is_on() -> bool:
    return bool(torch.backends.cuda.matmul.allow_fp16_accumulation)


@pytest.mark.parametrize("mode", MODES)
def test_it_goes_with_every_mode_and_is_on_before_a_network_runs(mode: str | None) -> None:
    placement = Placement(GPU, torch.float16, resident=True)
    asked = Settings(compile=mode, fp16_accumulation=True)  # type: ignore[arg-type]
    chosen = optimizations_of(asked, placement)
    assert chosen == {*MODES[asked.compile], "fp16_accumulation"}
    optimize({"fp16_accumulation"}, fresh_models().unet)
    assert is_on()


def test_it_stays_where_more_is_done_to_a_unet_later() -> None:
    """As COMPILE=auto does."""
    unet = fresh_models().unet
    optimize({"fp16_accumulation"}, unet)
    optimize({"channels_last"}, unet)
    assert is_on()


def test_no_row_of_the_benchmark_hands_it_to_the_next() -> None:
    optimize({"fp16_accumulation"}, fresh_models().unet)
    benchmark._let_go(CPU)
    assert not is_on()


def test_it_works_with_offloading() -> None:
    placement = Placement(GPU, torch.float16, resident=False)
    assert "fp16_accumulation" in optimizations_of(Settings(fp16_accumulation=True), placement)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(CPU, torch.float16, resident=True),
        Placement(GPU, torch.bfloat16, resident=True),
        Placement(GPU, torch.float32, resident=True),
    ],
)
def test_elsewhere_it_is_refused_not_ignored(placement: Placement) -> None:
    with pytest.raises(ModelError, match="^FP16_ACCUMULATION: needs a GPU, and weights in float16"):
        optimizations_of(Settings(fp16_accumulation=True), placement)


def test_a_worker_on_a_cpu_does_not_start_with_it() -> None:
    with pytest.raises(ModelError, match="FP16_ACCUMULATION: needs a GPU"):
        start(Settings(fp16_accumulation=True)).result()


def test_it_is_told_as_lossy_settings_are() -> None:
    lossy = Settings(fp16_accumulation=True).lossy
    assert json.dumps(lossy) == '{"FP16_ACCUMULATION": true}'
    assert Settings().lossy == {}


def test_the_benchmark_compares_it_with_what_it_is_added_to() -> None:
    rows = benchmark.WORKER_ROWS
    assert rows["fp16_accumulation"] - rows["channels_last"] == {"fp16_accumulation"}
    assert "a GPU is needed" in benchmark.why_not("fp16_accumulation", CPU)
