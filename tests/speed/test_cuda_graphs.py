"""UNets replayed as CUDA graphs, which a stand-in records on a CPU."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.flops import unet_inputs
from sdxl_worker import gpu
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.speed import cuda_graphs
from sdxl_worker.speed.compiling import at_the_start
from sdxl_worker.speed.optimize import optimize
from tests import inpainting_model
from tests.control_networks import control, control_picture, draw_controlled, single
from tests.speed.conftest import Recording
from tests.support import (
    PROMPT,
    REQUESTS,
    SCHEDULERS,
    canvas_of,
    draw,
    fresh_models,
    largest_difference,
    models,
    noise_picture,
    optimize_models,
)

pytestmark = pytest.mark.usefixtures("all_recordings")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_replayed_graphs_make_the_same_picture(scheduler: str, recordings: list[Recording]) -> None:
    """PNDM, without guidance, remembers outputs that the next replay overwrites."""
    graphed = fresh_models()
    optimize_models(graphed, ["cuda_graphs"])
    for guidance_scale in (7.5, 1.0):
        request = parse_request(
            {**REQUESTS["refined"], "scheduler": scheduler, "guidance_scale": guidance_scale}
        )
        [picture] = draw(request, graphed)
        assert largest_difference(picture, draw(request, models())[0]) == 0
    assert len(recordings) == 4, "base and refiner, with and without guidance"
    assert all(recording.replayed >= 3 for recording in recordings), "all steps but the first"


def test_a_unet_for_inpainting_is_replayed_with_each_job_s_mask(
    recordings: list[Recording], tmp_path: Path
) -> None:
    """What its further channels are given is copied in with the latents."""
    plain, graphed = (
        load_models(find_model_dir(Settings(model_dir=folder)))
        for folder in [inpainting_model.write(tmp_path / "model")] * 2
    )
    optimize(["cuda_graphs"], graphed.unet)
    job = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "mask_url": "https://a.org/b"}
    request = parse_request({**job, "image_url": "https://a.org/a"})
    for rows in (slice(0, 40), slice(64, 128)):
        mask = np.zeros((128, 96), bool)
        mask[rows] = True
        canvas = canvas_of(noise_picture(96, 128), mask)
        assert (
            largest_difference(*draw(request, graphed, canvas), *draw(request, plain, canvas)) == 0
        )
    assert len(recordings) == 1
    assert recordings[0].replayed == 5


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_what_controlnets_add_goes_into_the_recording(
    guidance_scale: float, recordings: list[Recording]
) -> None:
    """Steps in which none counts have a recording of their own, which plain jobs share."""
    graphed = fresh_models()
    optimize_models(graphed, ["cuda_graphs"])
    job = {**REQUESTS["base"], "num_inference_steps": 6, "guidance_scale": guidance_scale}
    request = parse_request(job)
    for controls in (
        [control(end=0.5)],
        [control(map=control_picture(seed=6)), control(single(), None, start=0.5)],
        [],
    ):
        [got] = draw_controlled(request, graphed, controls)
        [expected] = draw_controlled(request, models(), controls)
        assert largest_difference(got, expected) == 0
    assert len(recordings) == 2
    assert [recording.replayed for recording in recordings] == [3 + 6 - 1, 3 + 6 - 1]


def test_what_an_ip_adapter_adds_is_never_dropped(recordings: list[Recording]) -> None:
    """It stands in the blocks as other code, so that no recording would have it."""
    seen: list[Any] = []

    def forward(sample: torch.Tensor, *_: Any, **options: Any) -> tuple[torch.Tensor]:
        seen.append(options)
        return (2 * sample,)

    graphed = cuda_graphs.GraphedForward(forward, torch.device("cpu"))
    added = {"text_embeds": torch.ones(1), "time_ids": torch.ones(1)}
    residuals = {
        "down_block_additional_residuals": [torch.ones(1)],
        "mid_block_additional_residual": torch.ones(1),
    }
    for options in (
        {"added_cond_kwargs": {**added, "image_embeds": [torch.ones(1)]}, **residuals},
        {"added_cond_kwargs": added, "cross_attention_kwargs": {"ip_adapter_masks": []}},
    ):
        seen.clear()
        call: Any = graphed
        call(torch.ones(1), torch.ones(()), torch.ones(1), **options)
        assert len(seen) == 1
        assert {name: seen[0][name] for name in options} == options
    assert recordings == []


ADDED = {"text_embeds": torch.ones(1), "time_ids": torch.ones(1)}


def call(graphed: cuda_graphs.GraphedForward, *numbers: float) -> list[float]:
    """With a sample of these numbers, as the pipelines call it."""
    (output,) = graphed(
        torch.tensor(numbers),
        torch.ones(()),
        torch.ones(1),
        added_cond_kwargs=ADDED,
        timestep_cond=None,
        return_dict=False,
    )
    return output.tolist()


class Doubling:
    """A forward pass that keeps what it was called with."""

    def __init__(self) -> None:
        self.samples: list[torch.Tensor] = []

    def __call__(self, sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        self.samples.append(sample)
        return (2 * sample,)


@pytest.fixture
def doubling() -> Doubling:
    return Doubling()


@pytest.fixture
def graphed(doubling: Doubling) -> cuda_graphs.GraphedForward:
    return cuda_graphs.GraphedForward(doubling, torch.device("cpu"))


def test_a_shape_s_first_pass_is_run_its_second_recorded_and_later_ones_replayed(
    graphed: cuda_graphs.GraphedForward, doubling: Doubling, recordings: list[Recording]
) -> None:
    for number, (passes, recorded) in enumerate([(1, 0), (2, 1), (2, 1), (2, 1)]):
        assert call(graphed, number) == [2 * number]
        assert (len(doubling.samples), len(recordings)) == (passes, recorded)
    assert recordings[0].replayed == 3
    assert call(graphed, 5, 6) == [10, 12]
    assert (len(doubling.samples), len(recordings)) == (3, 1), "another shape's first"
    assert call(graphed, 7, 8) == [14, 16]
    assert len(recordings) == 2


def test_the_second_job_of_a_single_step_records_it(recordings: list[Recording]) -> None:
    one_by_one = fresh_models()
    optimize_models(one_by_one, ["cuda_graphs"])
    request = parse_request({**REQUESTS["base"], "num_inference_steps": 1})
    [plain] = draw(request, models())
    for replays in ([], [1], [2]):
        [picture] = draw(request, one_by_one)
        assert largest_difference(picture, plain) == 0
        assert [recording.replayed for recording in recordings] == replays


def test_the_least_used_recording_is_forgotten(
    graphed: cuda_graphs.GraphedForward, recordings: list[Recording]
) -> None:
    for size in range(1, cuda_graphs.MAX_SHAPES + 2):
        for _ in range(3):
            assert call(graphed, *[1] * size) == [2] * size
    assert len(recordings) == cuda_graphs.MAX_SHAPES + 1
    call(graphed, 1, 1)
    assert len(recordings) == cuda_graphs.MAX_SHAPES + 1
    assert call(graphed, 1) == [2]
    assert len(recordings) == cuda_graphs.MAX_SHAPES + 2, "at once: nothing is a first use"


def test_after_recordings_were_given_up_a_pass_comes_before_the_next(
    graphed: cuda_graphs.GraphedForward, doubling: Doubling, recordings: list[Recording]
) -> None:
    for _ in range(3):
        call(graphed, 1)
    graphed.forget()
    assert call(graphed, 2) == [4]
    assert (len(doubling.samples), len(recordings)) == (3, 1)
    assert call(graphed, 3) == [6]
    assert len(recordings) == 2


def test_the_first_pass_has_its_inputs_laid_out_as_the_recording(
    graphed: cuda_graphs.GraphedForward, doubling: Doubling
) -> None:
    """Or torch would compile code for the recording's while it is made."""
    picture = torch.rand(2, 4, 3, 5)
    whole = torch.rand(3, 4, 3, 5)
    for sample in (
        picture.to(memory_format=torch.channels_last),
        picture[:1].expand(2, -1, -1, -1),
        whole[1:],
    ):
        doubling.samples.clear()
        graphed.forget()
        for _ in range(2):
            (output,) = graphed(sample, torch.ones(()), torch.ones(1), added_cond_kwargs=ADDED)
            assert torch.equal(output, 2 * sample)
        first, recorded = doubling.samples
        assert first.stride() == recorded.stride()
        assert first.storage_offset() == recorded.storage_offset() == 0


class Streams:
    """Stands for CUDA's: which is the current one, and what was done on which, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, ...]] = []
        self.own, self.other = self.Stream(self, "own"), self.Stream(self, "other")
        self.current = self.own
        monkeypatch.setattr(torch.cuda, "stream", self.switched)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(cuda_graphs, "_stream", lambda: self.other)

    class Stream:
        def __init__(self, streams: "Streams", name: str) -> None:
            self._streams, self.name = streams, name

        def wait_stream(self, other: "Streams.Stream") -> None:
            self._streams.done.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def switched(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


WAITS_BOTH_WAYS = [("other", "waits for", "own"), ("other", "runs"), ("own", "waits for", "other")]


def test_the_first_pass_runs_on_the_stream_of_the_recordings_and_each_waits_for_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams(monkeypatch)

    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        streams.done.append((streams.current.name, "runs"))
        made.append(2 * sample)
        return (made[-1],)

    made: list[torch.Tensor] = []
    graphed = cuda_graphs.GraphedForward(forward, torch.device("cpu"))
    (output,) = graphed(torch.ones(1), torch.ones(()), torch.ones(1), added_cond_kwargs=ADDED)
    assert streams.done == WAITS_BOTH_WAYS
    assert output.tolist() == [2]
    assert output.data_ptr() != made[0].data_ptr(), "memory of the caller's own stream"


def test_a_first_pass_that_failed_is_no_first_pass(
    monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]
) -> None:
    """Its memory is still read by what it had queued: the other stream waits all the same."""
    streams = Streams(monkeypatch)
    runs: list[int] = []

    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        streams.done.append((streams.current.name, "runs"))
        runs.append(1)
        if len(runs) == 1:
            raise torch.OutOfMemoryError
        return (2 * sample,)

    graphed = cuda_graphs.GraphedForward(forward, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        call(graphed, 1)
    assert streams.done == WAITS_BOTH_WAYS
    assert streams.current is streams.own
    assert call(graphed, 2) == [4]
    assert recordings == []


class Refused:
    """A recording that CUDA refuses: torch raises when it ends it, and leaves the thread on the
    stream of the recordings and the memory as being recorded to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError]) -> None:
        self.pools: list[Any] = []
        self.released: list[Any] = []
        self.error: type[RuntimeError] | None = error
        self._underway: set[Any] = set()
        self._streams = Streams(monkeypatch)
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda _, pool: self.released.append(pool)
        )
        gpu.graph_memory.cache_clear()

    @contextlib.contextmanager
    def record(self, graph: Any, pool: Any, other: Any, **_: Any) -> Iterator[None]:
        assert pool not in self._underway, "already recording to mempool_id"
        self.pools.append(pool)
        self._underway.add(pool)
        self._streams.current = other
        with graph:
            yield
        if self.error is not None:
            raise self.error("operation not permitted when stream is capturing")
        self._underway.remove(pool)
        self._streams.current = self._streams.own

    def _end(self, _: int, pool: Any) -> None:
        if pool not in self._underway:
            raise RuntimeError("not currently recording to mempool_id")
        self._underway.remove(pool)

    @property
    def is_over(self) -> bool:
        """Nothing is left of it that later work would notice."""
        return self._streams.current is self._streams.own and not self._underway


def test_a_pass_that_cannot_be_recorded_runs_without_and_the_log_says_so(
    graphed: cuda_graphs.GraphedForward,
    doubling: Doubling,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = Refused(monkeypatch, RuntimeError)
    for number in range(1, 5):
        assert call(graphed, number) == [2 * number]
        assert refused.is_over
    assert len(doubling.samples) == 1 + 1 + 3, "the first, what was to be recorded, and the rest"
    assert refused.released == refused.pools
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("a pass cannot be recorded as a CUDA graph, and runs without: operation")
    refused.error = None
    for number in range(1, 4):
        assert call(graphed, number, 0) == [2 * number, 0]
    assert len(doubling.samples) == 5 + 2, "another shape is recorded, to memory of its own"
    assert len(set(refused.pools)) == 2


def test_where_there_was_no_memory_for_a_recording_the_job_may_make_room_and_try_again(
    graphed: cuda_graphs.GraphedForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Refused(monkeypatch, torch.OutOfMemoryError)
    assert call(graphed, 1) == [2]
    with pytest.raises(torch.OutOfMemoryError):
        call(graphed, 2)
    assert refused.is_over
    refused.error = None
    assert call(graphed, 3) == [6]
    assert len(refused.pools) == 2


@pytest.fixture
def compiled_in_a_recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of all that is compiled; in place of any code, Python's own is run. Recordings are empty."""
    made: list[bool] = []
    recording = [False]
    compile_function = torch.compile

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(recording[0])
        return graph.forward

    def compiled(what: Any, **options: Any) -> Any:
        return compile_function(what, backend=backend, **options)

    def compile_module(module: torch.nn.Module, **options: Any) -> None:
        module._compiled_call_impl = compiled(module._call_impl, **options)

    class Empty:
        def replay(self) -> None:
            pass

    @contextlib.contextmanager
    def record(*_: Any, **__: Any) -> Iterator[None]:
        recording[0] = True
        yield
        recording[0] = False

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Empty)
    monkeypatch.setattr(torch.cuda, "graph", record)
    torch._dynamo.reset()
    yield made
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def test_no_block_is_compiled_within_a_recording(compiled_in_a_recording: list[bool]) -> None:
    """At the start code is made for all sizes, in a warm-up; another size, no guidance and a longer
    prompt make none."""
    unet = fresh_models().unet
    optimize(["compile_blocks", "cuda_graphs"], unet)

    @torch.no_grad()
    def two_passes(rows: int, side: int, tokens: int) -> None:
        inputs = unet_inputs(unet, rows, 8 * side, 8 * side)
        states = torch.rand(rows, tokens, inputs["encoder_hidden_states"].shape[-1])
        added = {name: torch.rand(one.shape) for name, one in inputs["added_cond_kwargs"].items()}
        for _ in range(2):
            sample = torch.rand(inputs["sample"].shape)
            unet(sample, torch.ones(()), states, added_cond_kwargs=added, return_dict=False)

    with at_the_start(["compile_blocks"]):
        two_passes(2, 8, 77)
    made = len(compiled_in_a_recording)
    two_passes(2, 12, 77)
    two_passes(1, 8, 154)
    assert 0 < made == len(compiled_in_a_recording)
    assert not any(compiled_in_a_recording)


def test_no_code_for_latents_in_another_order_is_compiled_within_a_recording(
    compiled_in_a_recording: list[bool],
) -> None:
    """Those of a first step are in torch's order, later ones may be in the UNet's."""

    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (2 * sample,)

    graphed = cuda_graphs.GraphedForward(torch.compile(forward), torch.device("cpu"))
    latents = torch.rand(2, 4, 8, 8)
    for order in (torch.channels_last, torch.contiguous_format):
        sample = latents.to(memory_format=order)
        graphed(sample, torch.ones(()), torch.ones(1), added_cond_kwargs=ADDED)
    assert compiled_in_a_recording == [False]
