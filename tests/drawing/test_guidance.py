"""Guidance that ends before the picture does: at the right step, in every way of drawing, and with
half the work from there on."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import SDXLCFGCutoffCallback
from PIL import Image

from sdxl_worker.drawing import guidance as guidance_module
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.guidance import _guided_steps, warnings_of_guidance
from sdxl_worker.drawing.image_prompts import ImagePrompt, tokens_of_picture
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steering import Steering
from sdxl_worker.drawing.steps import Step
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.loading.ip_adapters import find_ip_adapter
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.speed.shared_passes import draw_side_by_side
from tests import inpainting_model, random_ip_adapters
from tests.control_networks import control, control_picture, single
from tests.support import (
    PROMPT,
    SCHEDULERS,
    canvas_of,
    difference,
    draw,
    error,
    fresh_models,
    largest_difference,
    models,
    noise_picture,
    plain_base,
    run,
)

JOB: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 5}
BASE = {**JOB, "refiner_inference_steps": 0}
SMALL = {"height": 64, "width": 64}
URL = {"image_url": "https://example.com/a.png"}
REDRAW = {**BASE, **URL, "mode": "img2img", "strength": 0.6, "num_inference_steps": 10}
PICTURE = noise_picture(64, 64)
HOLE = np.zeros((64, 64), bool)
HOLE[16:48, 16:48] = True
ROUNDING = 2  # of 255: what another number of rows leaves


@contextlib.contextmanager
def counted(*unets: Any) -> Iterator[list[tuple[int, int]]]:
    """Of each pass: which UNet, and how many rows it was given."""
    rows: list[tuple[int, int]] = []
    with contextlib.ExitStack() as undo:
        for number, unet in enumerate(unets):
            forward = unet.forward

            def count(
                sample: torch.Tensor,
                *args: Any,
                of: int = number,
                through: Callable[..., Any] = forward,
                **options: Any,
            ) -> Any:
                rows.append((of, len(sample)))
                return through(sample, *args, **options)

            undo.enter_context(mock.patch.object(unet, "forward", count))
        yield rows


def rows_of(
    job: dict[str, Any], by: Models | None = None, canvas: Canvas | None = None, **options: Any
) -> list[tuple[int, int]]:
    by = by or models()
    with counted(*by.unets()) as rows:
        draw(parse_request(job), by, canvas, **options)
    return rows


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


class TestAsPlainDiffusers:
    """Its callback is right for one picture of one pipeline. It takes effect after the step that it
    is told."""

    @pytest.mark.parametrize("name", ["DDIM", "K_EULER", "DPMSolverMultistep"])
    def test_text_to_image(self, name: str) -> None:
        expected = self.plain(StableDiffusionXLPipeline, name, 1, num_inference_steps=5)
        request = parse_request({**BASE, "scheduler": name, "guidance_end": 0.4})
        [got] = draw(request, models())
        assert same(got, expected)
        assert difference(got, draw(parse_request({**BASE, "scheduler": name}), models())[0]) > 1

    @pytest.mark.parametrize("name", ["DDIM", "K_EULER"])
    def test_image_to_image(self, name: str) -> None:
        expected = self.plain(
            StableDiffusionXLImg2ImgPipeline,
            name,
            2,  # of the six steps that are run
            image=PICTURE,
            strength=0.6,
            num_inference_steps=10,
        )
        request = parse_request({**REDRAW, "scheduler": name, "guidance_end": 0.5})
        [got] = draw(request, models(), canvas_of(PICTURE))
        assert same(got, expected)

    @staticmethod
    def plain(kind: Any, name: str, after: int, **options: Any) -> Image.Image:
        scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(plain_base().scheduler.config)
        pipeline = kind.from_pipe(plain_base(), scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        [picture] = pipeline(
            prompt=PROMPT,
            guidance_scale=7.5,
            generator=[torch.Generator("cpu").manual_seed(3)],
            callback_on_step_end=SDXLCFGCutoffCallback(
                cutoff_step_ratio=None, cutoff_step_index=after
            ),
            **options,
        ).images
        return picture


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({**BASE, "guidance_end": 0.6}, [(0, 2)] * 3 + [(0, 1)] * 2),
        ({**BASE, "guidance_end": 0.59}, [(0, 2)] * 2 + [(0, 1)] * 3),
        ({**BASE, "num_inference_steps": 10, "guidance_end": 0.7}, [(0, 2)] * 7 + [(0, 1)] * 3),
        ({**BASE, "guidance_end": 0}, [(0, 1)] * 5),
        ({**BASE, "guidance_end": 1}, [(0, 2)] * 5),
        ({**BASE, "guidance_end": 0.5, "num_inference_steps": 1}, [(0, 1)]),
        ({**BASE, "guidance_end": 0.6, "guidance_scale": 1}, [(0, 1)] * 5),
        ({**BASE, "guidance_end": 0.6, "num_images": 2}, [(0, 4)] * 3 + [(0, 2)] * 2),
        (
            {**JOB, "guidance_end": 0.5, "refiner_inference_steps": 8, "strength": 0.5},
            [(0, 2)] * 2 + [(0, 1)] * 3 + [(1, 2)] * 2 + [(1, 1)] * 2,
        ),
        (
            {**BASE, "guidance_end": 0.5, "hires": {"strength": 0.5, "steps": 8}},
            [(0, 2)] * 2 + [(0, 1)] * 3 + [(0, 2)] * 2 + [(0, 1)] * 2,
        ),
    ],
)
def test_a_step_that_is_not_wholly_before_the_end_is_half_the_work(
    job: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    assert rows_of({**job, **SMALL}) == expected


def test_a_share_that_is_so_many_steps_is_no_fewer_for_its_binary_fraction() -> None:
    for steps in (10, 25, 50, 100):
        counts = [_guided_steps(steps, i / steps) for i in range(steps + 1)]
        assert counts == list(range(steps + 1))
    assert _guided_steps(100, 0.29) == 29


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (0.9, [(0, 2)] * 8 + [(1, 2)] + [(1, 1)]),
        (0.8, [(0, 2)] * 8 + [(1, 1)] * 2),
        (0.5, [(0, 2)] * 5 + [(0, 1)] * 3 + [(1, 1)] * 2),
    ],
)
def test_base_and_refiner_that_share_a_schedule_are_counted_as_one(
    end: float, expected: list[tuple[int, int]]
) -> None:
    job = {**JOB, "num_inference_steps": 10, "high_noise_frac": 0.8, "guidance_end": end}
    assert rows_of({**job, **SMALL}) == expected


@pytest.mark.parametrize("name", ["K_HEUN", "K_DPM_2"])
@pytest.mark.parametrize("share", [{}, {"high_noise_frac": 0.6}])
def test_a_step_of_two_calls_is_cut_in_none_of_them(name: str, share: dict[str, Any]) -> None:
    job = {**JOB, **SMALL, "scheduler": name, "guidance_end": 0.4, **share}
    if not share:
        job["refiner_inference_steps"] = 0
    rows = [count for _, count in rows_of(job)]
    assert rows == [2] * 4 + [1] * 5


WAYS: dict[str, tuple[dict[str, Any], Canvas | None]] = {
    "text": ({**BASE, **SMALL}, None),
    "long prompts": ({**BASE, **SMALL, "negative_prompt": " ".join(["a green star"] * 40)}, None),
    "a batch": ({**BASE, **SMALL, "num_images": 3}, None),
    "ensemble": ({**JOB, **SMALL, "high_noise_frac": 0.6}, None),
    "rescaled": ({**BASE, **SMALL, "guidance_rescale": 0.7}, None),
    "image to image": (REDRAW, canvas_of(PICTURE)),
    "inpainting": (
        {**REDRAW, "mask_url": "https://example.com/mask.png"},
        canvas_of(PICTURE, HOLE),
    ),
}


def with_both_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in the plain way: nothing is left out, and of what comes out the half of the
    negative prompt is replaced."""

    def repeat(rows: Any, _: Any, __: Any, output: Any) -> Any:
        return (output[0].chunk(2)[1].repeat(2, 1, 1, 1),) if rows._is_cut else None

    monkeypatch.setattr(guidance_module, "_second_half", lambda rows: rows)
    monkeypatch.setattr(guidance_module._Rows, "repeat", repeat)


def check(
    monkeypatch: pytest.MonkeyPatch, drawn: Callable[[dict[str, Any]], list[Image.Image]]
) -> None:
    """Args: drawn: the pictures of a request with these further fields."""
    before = drawn({})
    got = drawn({"guidance_end": 0.4})
    assert all(map(same, drawn({}), before)), "something stays"
    with monkeypatch.context() as patched:
        with_both_rows(patched)
        expected = drawn({"guidance_end": 0.4})
    for one, other, uncut in zip(got, expected, before, strict=True):
        assert largest_difference(one, other) <= ROUNDING
        assert largest_difference(one, uncut) > 5 * ROUNDING, "or it would show nothing"


@pytest.mark.parametrize("way", WAYS)
def test_what_is_left_out_changes_nothing_and_nothing_stays(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, canvas = WAYS[way]
    check(
        monkeypatch,
        lambda fields: draw(parse_request({**job, **fields}), models(), canvas),
    )


@pytest.fixture(scope="module")
def with_nine_channels(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = inpainting_model.write(tmp_path_factory.mktemp("hub") / "inpainting")
    return load_models(find_model_dir(Settings(model_dir=folder)))


@pytest.mark.parametrize("count", [1, 2])
def test_with_a_unet_that_sees_the_mask(
    count: int, with_nine_channels: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {**REDRAW, "mask_url": "https://example.com/mask.png", "num_images": count}
    canvas = canvas_of(PICTURE, HOLE)
    check(
        monkeypatch,
        lambda fields: draw(parse_request({**job, **fields}), with_nine_channels, canvas),
    )


@pytest.mark.parametrize("count", [1, 2])
def test_with_controlnets(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    controls = (
        control(map=control_picture(64, 64)),
        control(single(), None, map=control_picture(64, 64)),
    )

    def drawn(fields: dict[str, Any]) -> list[Image.Image]:
        request = parse_request({**BASE, **SMALL, "num_images": count, **fields})
        return generate(
            request,
            plan_stages(request, models()),
            models(),
            steering=Steering(controls=controls),
        )

    check(monkeypatch, drawn)


def test_with_an_ip_adapter_and_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fresh_models()
    random_ip_adapters.make_ip_adapters(tmp_path, own.unet)
    files = find_ip_adapter("plus", tmp_path, "ip_adapter[0].type", own.unet)
    adapter, encoder = files.load(own.placement), files.encoder.load(own.placement)
    tokens = tokens_of_picture(noise_picture(64, 64), encoder, adapter, own.placement)
    prompt = ImagePrompt(adapter, tokens, "plus", 1.0, mask=np.eye(64, dtype=bool))

    def drawn(fields: dict[str, Any]) -> list[Image.Image]:
        request = parse_request({**BASE, **SMALL, "num_images": 2, **fields})
        steering = Steering(image_prompts=(prompt,))
        return generate(request, plan_stages(request, own), own, steering=steering)

    check(monkeypatch, drawn)


def test_each_picture_of_a_batch_is_as_alone() -> None:
    job = {**BASE, **SMALL, "guidance_end": 0.4}
    together = draw(parse_request({**job, "num_images": 3}), models())
    for i, one in enumerate(together):
        [alone] = draw(parse_request({**job, "seed": 3 + i}), models())
        assert largest_difference(one, alone) <= ROUNDING


def test_with_an_end_of_zero_it_is_a_picture_without_guidance() -> None:
    [off] = draw(parse_request({**BASE, **SMALL, "guidance_scale": 1}), models())
    [cut] = draw(parse_request({**BASE, **SMALL, "guidance_end": 0}), models())
    assert same(off, cut)


@pytest.mark.parametrize("end", [0.2, 0.4, 0.6])
def test_with_a_step_cache_the_first_step_without_guidance_is_a_deep_one(end: float) -> None:
    job = {**BASE, **SMALL, "num_inference_steps": 10, "guidance_end": end}
    with counted(models().unet.mid_block) as deep:
        rows = rows_of(job, step_cache_interval=5)
    guided = round(10 * end)
    assert [count for _, count in rows] == [2] * guided + [1] * (10 - guided)
    # The first, that after the cut, and the sixth.
    assert [count for _, count in deep] == ([2, 1, 1] if end < 0.5 else [2, 2, 1])


def test_the_keys_of_the_prompt_alone_are_computed_once_too() -> None:
    calls: list[int] = []
    attention = models().unet.mid_block.attentions[0].transformer_blocks[0].attn2
    hook = attention.to_k.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    try:
        draw(parse_request({**BASE, **SMALL, "guidance_end": 0.4}), models())
    finally:
        hook.remove()
    assert calls == [2, 1]


def test_the_steps_are_counted_as_ever() -> None:
    def steps(job: dict[str, Any]) -> list[tuple[str, int, int, int]]:
        told: list[Step] = []
        draw(parse_request(job), models(), on_step=told.append)
        return [(one.stage, one.step, one.steps, one.percent) for one in told]

    job = {**JOB, **SMALL, "high_noise_frac": 0.6}
    assert steps({**job, "guidance_end": 0.4}) == steps(job)


class TestACaller:
    @pytest.mark.parametrize("value", [-0.1, 1.5, "half"])
    def test_is_told_what_it_may_be(self, value: object) -> None:
        message = error({"prompt": PROMPT, "guidance_end": value})
        assert message.startswith("guidance_end: must be a number from 0 to 1; got ")

    @pytest.mark.parametrize("name", ["end_cfg_frac", "cfg_end", "cfg_cutoff"])
    def test_is_told_the_name(self, name: str) -> None:
        assert "guidance_end" in error({"prompt": PROMPT, name: 0.6})

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"guidance_end": 0.6}, []),
            ({}, []),
            (
                {"guidance_end": 0.6, "guidance_scale": 1},
                [
                    "guidance_end: has no effect with a guidance_scale of 1 or below; got 1",
                ],
            ),
            (
                {"guidance_end": 0.1},
                [
                    "guidance_scale: has no effect, for no step has guidance with a guidance_end "
                    "of 0.1"
                ],
            ),
            (
                {"guidance_end": 0, "negative_prompt": "blue"},
                [
                    "negative_prompt: has no effect, for no step has guidance with a guidance_end "
                    "of 0"
                ],
            ),
        ],
    )
    def test_is_warned_where_something_has_no_effect(
        self, fields: dict[str, Any], expected: list[str]
    ) -> None:
        request = parse_request({**BASE, **fields})
        assert warnings_of_guidance(request, plan_stages(request, models())) == expected

    def test_reads_the_warning_in_the_answer(self) -> None:
        output = run({**BASE, **SMALL, "guidance_end": 0.1})
        assert "guidance_end" in output["warning"]


def test_jobs_that_are_drawn_side_by_side_are_cut_each_for_itself() -> None:
    own = fresh_models()
    ends = (0.4, 0.8, 1)
    requests = [
        parse_request({**BASE, **SMALL, "seed": i, "guidance_end": end})
        for i, end in enumerate(ends)
    ]
    together: dict[int, list[Image.Image]] = {}

    def drawing(number: int) -> None:
        request = requests[number]
        stages = plan_stages(request, own)
        together[number] = generate(request, stages, own, shares_passes=True)

    to_begin = [functools.partial(drawing, number) for number in range(len(ends))]

    def begin(_: int) -> Iterator[Callable[[], None]]:
        while to_begin:
            yield to_begin.pop(0)

    with counted(own.unet) as rows:
        draw_side_by_side(begin)
    assert [count for _, count in rows] == [6, 6, 5, 5, 4]
    for number, request in enumerate(requests):
        [alone] = draw(request, own)
        [one] = together[number]
        assert largest_difference(one, alone) <= ROUNDING
