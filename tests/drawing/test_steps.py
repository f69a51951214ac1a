"""Denoising steps, as they are told."""

from collections import Counter
from typing import Any

import pytest
import torch

from sdxl_worker.drawing.steps import Step
from sdxl_worker.request import Request, parse_request
from sdxl_worker.speed.no_waits import StepsAhead
from tests.support import (
    PROMPT,
    REQUESTS,
    draw,
    models,
)


def test_the_host_is_held_back_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[StepsAhead] = []
    monkeypatch.setattr(StepsAhead, "limit", lambda steps_ahead: held.append(steps_ahead))
    steps: list[Any] = []
    draw(parse_request(REQUESTS["refined"]), models(), on_step=steps.append)
    # A job of another test may be on its last steps in a thread of its own.
    assert len(steps) in Counter(map(id, held)).values()
    assert len(steps) > 4


def test_steps_are_told_in_order_up_to_the_last() -> None:
    for settings, stages in (
        ({"refiner_inference_steps": 0}, ["base"]),
        ({"refiner_inference_steps": 10}, ["base", "refiner"]),
        ({"high_noise_frac": 0.5}, ["base", "refiner"]),
    ):
        request = Request(prompt=PROMPT, seed=1, num_inference_steps=6, **settings)
        told: list[Step] = []
        draw(request, models(), None, told.append)
        assert list(dict.fromkeys(one.stage for one in told)) == stages
        assert [one.percent for one in told] == sorted(one.percent for one in told)
        assert told[-1].percent == 100
        for name in stages:
            of_stage = [one for one in told if one.stage == name]
            assert [one.step for one in of_stage] == list(range(1, of_stage[0].steps + 1))


def test_watching_does_not_change_the_picture() -> None:
    request = Request(
        prompt=PROMPT, seed=1, num_inference_steps=5, scheduler="K_EULER", refiner_inference_steps=8
    )
    [unwatched] = draw(request, models())
    seen: list[torch.Tensor] = []
    [watched] = draw(request, models(), None, lambda one: seen.append(one.latents()))
    assert len(seen) == 5 + 2
    assert watched.tobytes() == unwatched.tobytes()
