"""COMPILE=auto: CUDA graphs where the host is what a pass waits for, and nowhere else."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.placement import Placement
from sdxl_worker.request import CHECK_INPUT, parse_request
from sdxl_worker.serving.start import start
from sdxl_worker.settings import Settings
from sdxl_worker.speed import optimize as optimize_module
from sdxl_worker.speed.cuda_graphs import GraphedForward
from sdxl_worker.speed.host_bound import is_host_bound, unet_pass
from sdxl_worker.speed.optimize import optimizations_of
from tests import inpainting_model
from tests.speed.conftest import Recording
from tests.support import REQUESTS, draw, largest_difference, models


class Device:
    """Does what is queued in the background, one after the other, as a GPU does."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def queue(self, seconds: float) -> None:
        self._last = self._thread.submit(time.sleep, seconds)

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        self._thread.shutdown()


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


@pytest.mark.parametrize(
    ("host_seconds", "device_seconds", "is_bound"),
    [(0.3, 0.1, True), (0.1, 0.3, False), (0.24, 0.32, False)],
)
def test_the_host_is_what_a_pass_waits_for_where_it_takes_nine_tenths_of_it(
    host_seconds: float,
    device_seconds: float,
    is_bound: bool,
    device: Device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    launches = 4

    def run() -> None:
        assert not torch.is_grad_enabled(), "as in a step"
        for _ in range(launches):
            device.queue(device_seconds / launches)
            time.sleep(host_seconds / launches)

    assert is_host_bound(run, device.wait) is is_bound
    [line] = [record.getMessage() for record in caplog.records]
    told = re.fullmatch(
        r"COMPILE=auto: a pass takes ([\d.]+) ms, of which the host needs ([\d.]+): "
        r"CUDA graphs are (used|not used)",
        line,
    )
    assert told is not None
    whole_ms, host_ms = float(told[1]), float(told[2])
    assert 1000 * host_seconds <= host_ms <= whole_ms
    assert whole_ms >= 1000 * device_seconds
    assert told[3] == ("used" if is_bound else "not used")


def test_one_pass_that_was_disturbed_decides_nothing(device: Device) -> None:
    disturbances = [1.5, 0]

    def run() -> None:
        time.sleep(disturbances.pop(0) + 0.02)
        device.queue(0.1)

    assert is_host_bound(run, device.wait) is False


def for_inpainting(folder: Path) -> Models:
    return load_models(find_model_dir(Settings(model_dir=inpainting_model.write(folder))))


def described(inputs: Any) -> Any:
    """Shapes and number formats, whatever they are nested in."""
    if isinstance(inputs, torch.Tensor):
        return tuple(inputs.shape), inputs.dtype
    if isinstance(inputs, dict):
        return {name: described(one) for name, one in inputs.items() if one is not None}
    return inputs


@pytest.mark.parametrize("kind", ["of the worker", "for inpainting"])
def test_the_pass_that_is_judged_is_that_of_a_start_s_first_picture(
    kind: str, tmp_path: Path
) -> None:
    some_models = models() if kind == "of the worker" else for_inpainting(tmp_path / "model")
    seen: list[Any] = []

    def see(_: Any, inputs: Any, options: Any, __: Any) -> None:
        sample, timestep, *states = inputs
        named = dict(zip(["encoder_hidden_states"], states, strict=False)) | options
        seen.append([described(sample), tuple(timestep.shape), described(named)])

    hook = some_models.unet.register_forward_hook(see, with_kwargs=True)
    draw(parse_request(CHECK_INPUT), some_models)
    in_a_picture = seen[-1]
    is_host_bound(unet_pass(some_models.unet), lambda: None)
    hook.remove()
    assert seen[-1] == in_a_picture


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.usefixtures("all_recordings")
def test_a_start_takes_graphs_for_both_unets_where_the_host_is_slower(
    is_slow: bool,
    recordings: list[Recording],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A CPU runs a pass while it is launched, as if the host were the slower one; a device that
    takes half a second more turns that round."""
    expected = draw(parse_request(REQUESTS["refined"]), models())
    caplog.set_level("INFO")
    monkeypatch.setattr(optimize_module, "optimizations_of", lambda *_: {"cuda_graphs"})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.5 * is_slow))
    started = start(Settings(compile="auto")).result()
    assert recordings == [], "judged as it is without"
    told = [record.getMessage() for record in caplog.records]
    [at] = [number for number, line in enumerate(told) if line.startswith("COMPILE=auto: a pass")]
    assert sum("drew a first picture" in line for line in told[:at]) == 2, "nothing is read now"
    graphed = [isinstance(unet.forward, GraphedForward) for unet in started.unets()]
    assert graphed == [not is_slow] * 2
    drawn = draw(parse_request(REQUESTS["refined"]), started)
    assert largest_difference(*drawn, *expected) == 0
    assert len(recordings) == (0 if is_slow else 2)


def test_where_there_can_be_no_graphs_nothing_is_judged(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU, beside a step cache, and where networks take turns."""
    caplog.set_level("INFO")
    models()  # or what an earlier test started would be taken
    started = start(Settings(compile="auto")).result()
    assert not any(isinstance(unet.forward, GraphedForward) for unet in started.unets())
    assert "COMPILE=auto" not in caplog.text
    gpu = torch.device("cuda")
    for settings, placement in (
        (Settings(compile="auto", step_cache=2), Placement(gpu, torch.float16, resident=True)),
        (Settings(compile="auto"), Placement(gpu, torch.float16, resident=False)),
    ):
        assert optimizations_of(settings, placement) == {"channels_last", "direct_attention"}
