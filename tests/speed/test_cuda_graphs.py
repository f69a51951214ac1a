"""UNets replayed as CUDA graphs, which a stand-in records on a CPU."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.speed import cuda_graphs
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
    assert sum(recording.replayed for recording in recordings) > 12


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
    assert recordings[0].replayed == 6


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
    assert [recording.replayed for recording in recordings] == [3 + 6, 3 + 6]


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


def test_each_shape_is_recorded_once_and_the_least_used_is_forgotten(
    recordings: list[Recording],
) -> None:
    runs: list[int] = []

    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        runs.append(len(recordings))
        return (2 * sample,)

    graphed = cuda_graphs.GraphedForward(forward, torch.device("cpu"))

    def call(size: int) -> torch.Tensor:
        added = {"text_embeds": torch.ones(1), "time_ids": torch.ones(1)}
        return graphed(
            torch.ones(size),
            torch.ones(()),
            torch.ones(1),
            added_cond_kwargs=added,
            timestep_cond=None,
            return_dict=False,
        )[0]

    for size in (1, 2, 1, 2):
        assert call(size).tolist() == [2] * size
    assert len(recordings) == 2
    assert runs.count(0) >= 2, "what libraries do at first use is no part of a recording"
    for size in range(3, 3 + cuda_graphs.MAX_SHAPES):
        call(size)
    call(1)
    assert len(recordings) == 2 + cuda_graphs.MAX_SHAPES + 1


def test_after_a_recording_that_failed_the_thread_is_on_its_own_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By itself torch would not go back: it ends the recording first, and that raises."""
    on = [torch.cuda.Stream()]
    own = on[0]

    @contextlib.contextmanager
    def stream(other: Any) -> Iterator[None]:
        before, on[0] = on[0], other
        try:
            yield
        finally:
            on[0] = before

    @contextlib.contextmanager
    def record(_graph: Any, _pool: Any, other: Any, **_: Any) -> Iterator[None]:
        on[0] = other
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: on[0])
    graphed = cuda_graphs.GraphedForward(lambda sample, *_, **__: (sample,), torch.device("cpu"))
    added = {"text_embeds": torch.ones(1), "time_ids": torch.ones(1)}
    with pytest.raises(RuntimeError, match="not permitted"):
        graphed(torch.ones(1), torch.ones(()), torch.ones(1), added_cond_kwargs=added)
    assert on == [own]
