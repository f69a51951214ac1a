"""Drawings side by side: each picture is as it is alone, whatever happens to the others."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import ref

import pytest
import torch
from PIL import Image

from benchmarks.company import any_request, side_by_side
from sdxl_worker.drawing import batches, second_tries
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steps import Step
from sdxl_worker.errors import PictureError
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from sdxl_worker.speed import shared_passes
from sdxl_worker.speed.cuda_graphs import GraphedForward
from sdxl_worker.speed.shared_passes import SharedUnet, _Pass, draw_side_by_side
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


def test_a_pass_is_shared_and_rows_are_those_of_all(shared_models: Models, rows: list[int]) -> None:
    all_at_once(
        [
            Drawing(BASE, shared_models),
            Drawing({**BASE, "guidance_scale": 1, "scheduler": "K_EULER"}, shared_models),
            Drawing({**BASE, "num_images": 2, "num_inference_steps": 6}, shared_models),
        ]
    )
    assert rows == [7, 7, 7, 7, 4, 4]


def test_alone_it_is_the_same_bit_for_bit(shared_models: Models) -> None:
    drawing = Drawing(SMALL, shared_models)
    all_at_once([drawing])
    assert drawing.pictures[0].tobytes() == drawn(SMALL, shared_models)[0].tobytes()


def test_one_that_comes_later_joins_at_the_next_pass(
    shared_models: Models, rows: list[int]
) -> None:
    first, second = (Drawing(BASE, shared_models) for _ in range(2))
    calls = iter(range(100))

    def begin(_: int) -> Iterator[Drawing]:
        yield from {0: [first], 3: [second]}.get(next(calls), [])

    draw_side_by_side(begin)
    assert rows == [2, 2, 2, 4, 2, 2, 2]
    assert largest_difference(first.pictures[0], second.pictures[0]) <= ROUNDING


def test_one_that_is_stopped_leaves_at_the_next_pass(
    shared_models: Models, rows: list[int]
) -> None:
    class StoppedError(Exception):
        pass

    def stop_at_two(step: Step) -> None:
        if step.step == 2:
            raise StoppedError

    stopped = Drawing(BASE, shared_models, on_step=stop_at_two)
    other = Drawing(BASE, shared_models)
    all_at_once([stopped, other])
    assert isinstance(stopped.error, StoppedError)
    assert rows == [4, 4, 2, 2]
    alone = drawn(BASE, shared_models)[0]
    assert largest_difference(other.pictures[0], alone) <= ROUNDING


def test_each_has_its_own_progress(shared_models: Models) -> None:
    steps: dict[int, list[tuple[str, int, int, int]]] = {2: [], 5: []}

    def note(into: list[tuple[str, int, int, int]]) -> Callable[[Step], None]:
        return lambda step: into.append((step.stage, step.step, step.steps, step.percent))

    all_at_once(
        [
            Drawing({**BASE, "num_inference_steps": n}, shared_models, on_step=note(steps[n]))
            for n in steps
        ]
    )
    assert steps[2] == [("base", 1, 2, 50), ("base", 2, 2, 100)]
    assert steps[5] == [("base", i, 5, 20 * i) for i in range(1, 6)]


def out_of_memory(rows_max: int, monkeypatch: pytest.MonkeyPatch, unet: Any) -> list[int]:
    """A pass of more rows does not fit. Gives those that were tried."""
    tried: list[int] = []
    forward = unet.forward

    def limited(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        tried.append(len(sample))
        if len(sample) > rows_max:
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(unet, "forward", limited)
    return tried


def test_out_of_memory_a_pass_is_done_in_halves(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {**BASE, "num_inference_steps": 2}
    alone = drawn(job, shared_models)[0]
    tried = out_of_memory(4, monkeypatch, shared_models.unet)
    drawings = [Drawing(job, shared_models) for _ in range(4)]
    all_at_once(drawings)
    assert tried == [8, 4, 4, 4, 4], "what did not fit is not tried at each pass"
    assert all(largest_difference(one.pictures[0], alone) <= ROUNDING for one in drawings)


def test_before_a_pass_is_tried_in_halves_memory_is_freed(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of recordings too, which is what most of it is."""
    freed: list[str] = []

    class Recorded(GraphedForward):
        def forget(self) -> None:
            freed.append("recordings")

        def __call__(self, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if len(sample) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return self._forward(sample, *arguments, **options)

    unet = shared_models.unet
    monkeypatch.setattr(unet, "forward", Recorded(unet.forward, torch.device("cpu")))
    monkeypatch.setattr(shared_passes, "free_memory", lambda: freed.append("the rest"))
    drawings = [Drawing({**BASE, "num_inference_steps": 1}, shared_models) for _ in range(3)]
    all_at_once(drawings)
    assert freed == ["recordings", "the rest"]
    assert all(one.pictures for one in drawings)


def test_one_that_does_not_fit_even_alone_fails_alone(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_tries.COUNTS.clear()
    out_of_memory(2, monkeypatch, shared_models.unet)
    fits, several, another = (
        Drawing(one, shared_models) for one in (BASE, {**BASE, "num_images": 2}, BASE)
    )
    all_at_once([fits, several, another])
    assert fits.error is several.error is another.error is None
    assert len(several.pictures) == 2, "its own batches became smaller"
    assert second_tries.COUNTS["drawn in smaller batches"] == 1
    out_of_memory(1, monkeypatch, shared_models.unet)
    too_large = Drawing(BASE, shared_models)
    fits = Drawing({**BASE, "guidance_scale": 1}, shared_models)
    all_at_once([too_large, fits])
    assert isinstance(too_large.error, torch.OutOfMemoryError)
    assert len(fits.pictures) == 1


def plan_for(most_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(_: Models, *, num_images: int, **__: Any) -> Plan:
        return Plan(num_images, slicing=False, tiling=False, most_at_once=most_at_once)

    monkeypatch.setattr(batches, "plan", plan)


def test_passes_are_as_large_as_the_memory_plan_allows(
    shared_models: Models, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_for(2, monkeypatch)
    all_at_once([Drawing({**BASE, "num_inference_steps": 1}, shared_models) for _ in range(5)])
    assert sorted(rows) == [2, 4, 4]
    assert max(rows) <= 4


def test_numbers_that_are_not_finite_are_one_drawing_s_own(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put into its rows, for each try."""
    forward = shared_models.unet.forward

    def with_nan(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        (output,) = forward(sample, *arguments, **options)
        output = output.clone()
        output[:2] = float("nan")
        return (output,)

    alone = drawn(BASE, shared_models)[0]
    monkeypatch.setattr(shared_models.unet, "forward", with_nan)
    # In its second try it is drawn alone, after the other.
    spoilt, other = (Drawing(BASE, shared_models) for _ in range(2))
    all_at_once([spoilt, other])
    assert isinstance(spoilt.error, PictureError)
    assert other.error is None
    assert largest_difference(other.pictures[0], alone) <= ROUNDING


def test_recorded_passes_have_a_power_of_two_of_rows(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorded(GraphedForward):
        def __init__(self, forward: Callable[..., Any]) -> None:
            super().__init__(forward, torch.device("cpu"))
            self.rows: list[int] = []

        def __call__(self, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.rows.append(len(sample))
            return self._forward(sample, *arguments, **options)

    recorded = Recorded(shared_models.unet.forward)
    alone = drawn(BASE, shared_models)[0]
    monkeypatch.setattr(shared_models.unet, "forward", recorded)
    drawings = [Drawing(BASE, shared_models) for _ in range(3)]
    drawings.append(Drawing({**BASE, "num_inference_steps": 5}, shared_models))
    all_at_once(drawings[:3])
    assert recorded.rows == [8, 8, 8, 8], "6, and 2 more"
    assert all(largest_difference(one.pictures[0], alone) <= ROUNDING for one in drawings[:3])
    recorded.rows.clear()
    all_at_once([Drawing({**BASE, "num_images": 3}, shared_models)])
    assert set(recorded.rows) == {6}, "alone, as without company"


def test_what_fills_up_a_recorded_pass_is_in_the_memory_plan(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorded(GraphedForward):
        def __call__(self, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            seen.append(len(sample))
            return self._forward(sample, *arguments, **options)

    seen: list[int] = []
    recorded = Recorded(shared_models.unet.forward, torch.device("cpu"))
    monkeypatch.setattr(shared_models.unet, "forward", recorded)
    plan_for(3, monkeypatch)
    all_at_once([Drawing({**BASE, "num_inference_steps": 1}, shared_models) for _ in range(3)])
    assert seen == [2, 4], "6 would be filled up to 8"


@pytest.mark.parametrize("error", [SystemExit, ValueError])
def test_whatever_a_pass_raises_each_drawing_ends(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(shared_models.unet, "forward", broken)
    drawings = [Drawing(BASE, shared_models) for _ in range(3)]
    all_at_once(drawings)
    assert [type(one.error) for one in drawings] == [error] * 3


def test_a_drawing_sees_the_variables_of_its_thread() -> None:
    """torch keeps its settings in them, such as how often something may be compiled anew."""
    variable: ContextVar[int] = ContextVar("variable", default=0)
    variable.set(1)
    seen: list[int] = []
    to_begin = [lambda: seen.append(variable.get())]
    draw_side_by_side(lambda _: [to_begin.pop()] if to_begin else [])
    assert seen == [1]


def test_passes_are_one_only_where_unet_inputs_and_options_are_alike() -> None:
    def kind(unet: str = "base", dtype: torch.dtype = torch.float16, **rest: Any) -> Any:
        rows = (torch.zeros(2, 4, 8, 8, dtype=dtype),)
        return _Pass(unet, rows, torch.zeros(()), {"return_dict": False, **rest}, None).kind

    assert kind() == kind()
    condition = torch.zeros(2, 8)
    others = (kind("refiner"), kind(dtype=torch.float32), kind(timestep_cond=condition))
    assert all(kind() != other for other in others)


def test_what_a_failed_pass_held_is_free_before_the_next(
    shared_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its error waits for the drawings that it was tried with."""
    held: list[ref[torch.Tensor]] = []
    free: list[bool] = []
    forward = shared_models.unet.forward

    def limited(*arguments: Any, **options: Any) -> Any:
        free.append(all(one() is None for one in held))
        if len(held) < 2:
            activation = torch.zeros(8)
            held.append(ref(activation))
            raise torch.OutOfMemoryError
        return forward(*arguments, **options)

    monkeypatch.setattr(shared_models.unet, "forward", limited)
    all_at_once([Drawing({**BASE, "num_inference_steps": 1}, shared_models) for _ in range(2)])
    # Together, one, the other, and the one again.
    assert free == [True] * 4


def test_gradients_stay_off_when_one_is_done(shared_models: Models) -> None:
    needed: list[bool] = []

    def note(_: Step) -> None:
        needed.append(torch.is_grad_enabled())

    short = Drawing({**BASE, "num_inference_steps": 1}, shared_models)
    all_at_once([Drawing(BASE, shared_models, on_step=note), short])
    assert needed == [False] * 4
    assert torch.is_grad_enabled()


def test_the_vae_is_as_it_was(shared_models: Models) -> None:
    """Each decodes in its own way, while others are between two passes."""
    vae = shared_models.vae
    before = (vae.dtype, vae.use_slicing, vae.use_tiling)
    all_at_once([Drawing({**BASE, "num_inference_steps": n}, shared_models) for n in (1, 3, 2, 5)])
    assert (vae.dtype, vae.use_slicing, vae.use_tiling) == before


def test_what_is_shared_is_no_part_of_the_stand_in(shared_models: Models) -> None:
    shared = SharedUnet(shared_models.unet)
    assert list(shared.parameters()) == []
    assert shared.config is shared_models.unet.config
