"""Drawings side by side: each picture is as it is alone, whatever happens to the others."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.company import any_request, side_by_side
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from sdxl_worker.speed.shared_passes import draw_side_by_side
from tests.support import PROMPT, canvas_of, fresh_models, largest_difference, noise_picture

SMALL = {"prompt": PROMPT, "seed": 3, "height": 64, "width": 64, "num_inference_steps": 4}
BASE = {**SMALL, "refiner_inference_steps": 0}
# Of 255: what another order of adding up leaves.
ROUNDING = 2


@pytest.fixture(scope="module")
def shared_models() -> Models:
    return fresh_models()


def drawn(job_input: dict[str, Any], by: Models, **options: Any) -> list[Image.Image]:
    canvas = None
    if "image_url" in job_input:
        canvas = canvas_of(noise_picture(64, 64))
        job_input = {name: job_input[name] for name in job_input if name not in ("height", "width")}
    request = parse_request(job_input)
    return generate(request, plan_stages(request, by), by, canvas, **options)


class Drawing:
    """One that may be drawn beside others, and its outcome."""

    def __init__(self, job_input: dict[str, Any], by: Models, **options: Any) -> None:
        self._draw: Callable[[], list[Image.Image]] = lambda: drawn(
            job_input, by, shares_passes=True, **options
        )
        self.pictures: list[Image.Image] = []
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.pictures = self._draw()
        except BaseException as error:
            self.error = error


def all_at_once(drawings: Sequence[Drawing]) -> None:
    to_begin = list(drawings)

    def begin(_: int) -> Iterator[Drawing]:
        while to_begin:
            yield to_begin.pop(0)

    draw_side_by_side(begin)


@pytest.fixture
def rows(shared_models: Models, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each pass of the base."""
    seen: list[int] = []
    forward = shared_models.unet.forward

    def counted(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(len(sample))
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(shared_models.unet, "forward", counted)
    return seen


def test_each_picture_is_as_it_is_alone_in_any_company(shared_models: Models) -> None:
    """Any sampler, steps, guidance, prompts and stages; they begin at any time."""
    choose = random.Random(15)  # noqa: S311 - no secret
    for _ in range(8):
        job_inputs = [any_request(choose) for _ in range(choose.randint(2, 6))]
        draw = [
            functools.partial(drawn, job_input, shared_models, shares_passes=True)
            for job_input in job_inputs
        ]
        for job_input, pictures in zip(job_inputs, side_by_side(draw, choose), strict=True):
            alone = drawn(job_input, shared_models)
            for one, other in zip(pictures, alone, strict=True):
                assert largest_difference(one, other) <= ROUNDING, job_input
