"""ControlNets: as in plain diffusers, in every way of drawing, and gone afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from PIL import Image

from sdxl_worker.drawing import batches
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.steps import Step
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings
from tests import inpainting_model
from tests.control_networks import (
    control,
    control_picture,
    draw_controlled,
    single,
    union,
)
from tests.support import (
    PROMPT,
    SCHEDULERS,
    canvas_of,
    difference,
    draw,
    largest_difference,
    models,
    noise_picture,
    plain_base,
)

JOB = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 5, "refiner_inference_steps": 0}
URL = {"image_url": "https://example.com/a.png"}
REDRAW = {**JOB, **URL, "mode": "img2img", "strength": 0.6, "num_inference_steps": 8}
MASK = {"mask_url": "https://example.com/mask.png"}
PICTURE = noise_picture(96, 128)
HOLE = np.zeros((128, 96), bool)
HOLE[32:80, 16:64] = True  # along the borders of latents, where diffusers loses nothing
CONFIG = dict(plain_base().scheduler.config)
SMALL_MAP = control_picture(96, 128)

NAMES = ["DDIM", "K_EULER", "DPMSolverMultistep"]
GUIDANCE = [7.5, 1.0]


def plain(kind: type, controlnet: Any, name: str, guidance: float, **options: Any) -> Any:
    """As a plain script draws it."""
    scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(CONFIG)
    pipeline = kind.from_pipe(  # type: ignore[attr-defined]
        plain_base(), controlnet=controlnet, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    [picture] = pipeline(
        prompt=PROMPT,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(3)],
        **options,
    ).images
    return picture


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", NAMES)
class TestPixelForPixelAsPlainDiffusers:
    def test_text_to_image_with_a_union(self, name: str, guidance: float) -> None:
        expected = plain(
            StableDiffusionXLControlNetUnionPipeline,
            union(),
            name,
            guidance,
            control_image=[control_picture()],
            control_mode=[3],
            controlnet_conditioning_scale=0.8,
            num_inference_steps=5,
            height=128,
            width=128,
        )
        request = parse_request({**JOB, "scheduler": name, "guidance_scale": guidance})
        [got] = draw_controlled(request, models(), [control(scale=0.8)])
        assert same(got, expected)
        assert difference(got, draw(request, models())[0]) > 1, "or it would show nothing"

    def test_text_to_image_with_two_types_of_a_union(self, name: str, guidance: float) -> None:
        pictures = [control_picture(), control_picture(seed=6)]
        expected = plain(
            StableDiffusionXLControlNetUnionPipeline,
            union(),
            name,
            guidance,
            control_image=pictures,
            control_mode=[1, 3],
            controlnet_conditioning_scale=[0.5, 0.9],
            num_inference_steps=5,
            height=128,
            width=128,
        )
        request = parse_request({**JOB, "scheduler": name, "guidance_scale": guidance})
        controls = [
            control(mode=1, map=pictures[0], scale=0.5),
            control(mode=3, map=pictures[1], scale=0.9),
        ]
        assert same(draw_controlled(request, models(), controls)[0], expected)

    def test_text_to_image_with_one_for_a_single_type(self, name: str, guidance: float) -> None:
        expected = plain(
            StableDiffusionXLControlNetPipeline,
            single(),
            name,
            guidance,
            image=control_picture(),
            controlnet_conditioning_scale=0.8,
            control_guidance_start=0.2,
            control_guidance_end=0.8,
            num_inference_steps=5,
            height=128,
            width=128,
        )
        request = parse_request({**JOB, "scheduler": name, "guidance_scale": guidance})
        controls = [control(single(), None, scale=0.8, start=0.2, end=0.8)]
        assert same(draw_controlled(request, models(), controls)[0], expected)

    def test_image_to_image_with_a_union(self, name: str, guidance: float) -> None:
        expected = plain(
            StableDiffusionXLControlNetUnionImg2ImgPipeline,
            union(),
            name,
            guidance,
            image=PICTURE,
            control_image=[SMALL_MAP],
            control_mode=[6],
            controlnet_conditioning_scale=0.8,
            control_guidance_start=0.25,
            control_guidance_end=0.75,
            strength=0.6,
            num_inference_steps=8,
            height=128,
            width=96,
        )
        request = parse_request({**REDRAW, "scheduler": name, "guidance_scale": guidance})
        controls = [control(mode=6, map=SMALL_MAP, start=0.25, end=0.75)]
        [got] = draw_controlled(request, models(), controls, canvas_of(PICTURE))
        assert same(got, expected)

    def test_inpainting_with_a_union_but_for_rounding(self, name: str, guidance: float) -> None:
        """Its pipeline encodes in another memory order."""
        expected = plain(
            StableDiffusionXLControlNetUnionInpaintPipeline,
            union(),
            name,
            guidance,
            image=PICTURE,
            mask_image=Image.fromarray(HOLE),
            control_image=[SMALL_MAP],
            control_mode=[7],
            controlnet_conditioning_scale=0.8,
            control_guidance_end=0.75,
            strength=0.6,
            num_inference_steps=8,
            height=128,
            width=96,
        )
        request = parse_request({**REDRAW, **MASK, "scheduler": name, "guidance_scale": guidance})
        controls = [control(mode=7, map=SMALL_MAP, end=0.75)]
        [got] = draw_controlled(request, models(), controls, canvas_of(PICTURE, HOLE))
        assert largest_difference(got, expected) <= 1
        assert difference(got, expected) < 0.001


def test_several_networks_add_up_as_in_plain_diffusers() -> None:
    pictures = [control_picture(), control_picture(seed=6)]
    expected = plain(
        StableDiffusionXLControlNetPipeline,
        [single(1), single(2)],
        "DDIM",
        7.5,
        image=pictures,
        controlnet_conditioning_scale=[0.5, 0.9],
        control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.6, 1.0],
        num_inference_steps=5,
        height=128,
        width=128,
    )
    controls = [
        control(single(1), None, map=pictures[0], scale=0.5, end=0.6),
        control(single(2), None, map=pictures[1], scale=0.9, start=0.4),
    ]
    request = parse_request({**JOB, "scheduler": "DDIM"})
    assert same(draw_controlled(request, models(), controls)[0], expected)


def test_one_for_a_single_type_redraws_as_in_plain_diffusers() -> None:
    expected = plain(
        StableDiffusionXLControlNetImg2ImgPipeline,
        single(),
        "K_EULER",
        7.5,
        image=PICTURE,
        control_image=SMALL_MAP,
        controlnet_conditioning_scale=0.8,
        strength=0.6,
        num_inference_steps=8,
        height=128,
        width=96,
    )
    request = parse_request({**REDRAW, "scheduler": "K_EULER"})
    controls = [control(single(), None, map=SMALL_MAP)]
    assert same(draw_controlled(request, models(), controls, canvas_of(PICTURE))[0], expected)


@pytest.mark.parametrize("name", [*SCHEDULERS, "Heun"])
def test_every_sampler_draws_with_one(name: str) -> None:
    """Heun calls the UNet twice in a step, PNDM once more than there are steps."""
    request = parse_request({**JOB, "scheduler": name})
    with calls_of(union()) as calls:
        [got] = draw_controlled(request, models(), [control()])
    assert len(calls) == {"Heun": 9, "PNDM": 6}.get(name, 5)
    assert difference(got, draw(request, models())[0]) > 1


@contextlib.contextmanager
def calls_of(network: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each call, the first one as `sample`."""
    calls: list[dict[str, Any]] = []

    def note(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append({"sample": inputs[0], "timestep": inputs[1], **options})

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


TEN = {**JOB, "num_inference_steps": 10}


@pytest.mark.parametrize(
    ("share", "count"),
    [({"end": 0.3}, 3), ({"start": 0.7}, 3), ({"start": 0.25, "end": 0.55}, 2), ({"end": 0.05}, 0)],
)
def test_a_step_in_which_it_does_not_count_costs_nothing(share: dict[str, Any], count: int) -> None:
    with calls_of(union()) as calls:
        draw_controlled(parse_request(TEN), models(), [control(**share)])
    assert len(calls) == count


def test_with_no_step_in_which_it_counts_the_picture_is_the_plain_one() -> None:
    request = parse_request(JOB)
    [got] = draw_controlled(request, models(), [control(start=0.3, end=0.35)])
    assert same(got, draw(request, models())[0])


def test_its_share_is_of_the_whole_schedule_also_where_the_refiner_goes_on() -> None:
    job = {**JOB, "num_inference_steps": 8, "refiner_inference_steps": 8, "high_noise_frac": 0.5}
    for scheduler, count in (("DDIM", 4), ("Heun", 6)):
        with calls_of(union()) as calls:
            draw_controlled(
                parse_request({**job, "scheduler": scheduler}), models(), [control(end=0.5)]
            )
        assert len(calls) == count


def test_its_share_is_of_the_steps_that_strength_leaves() -> None:
    request = parse_request({**REDRAW, "num_inference_steps": 10, "strength": 0.4})
    with calls_of(union()) as calls:
        draw_controlled(request, models(), [control(map=SMALL_MAP, end=0.5)], canvas_of(PICTURE))
    assert len(calls) == 2


def test_only_the_base_is_steered() -> None:
    seen: list[str] = []
    request = parse_request({**JOB, "refiner_inference_steps": 8, "strength": 0.5})
    with calls_of(union()) as calls:
        draw_controlled(
            request, models(), [control()], on_step=lambda step: seen.append(step.stage)
        )
    assert len(calls) == seen.count("base") == 5
    assert seen.count("refiner") == 4


def test_types_of_one_union_go_in_one_call_as_long_as_both_count() -> None:
    controls = [control(mode=1, scale=0.5, end=0.6), control(mode=3, scale=0.9, start=0.4)]
    with calls_of(union()) as calls:
        draw_controlled(parse_request(TEN), models(), controls)
    given = [call["control_type_idx"] for call in calls]
    assert given == [[1]] * 4 + [[1, 3]] * 2 + [[3]] * 4
    assert calls[4]["conditioning_scale"] == [0.5, 0.9]
    assert calls[4]["control_type"].tolist() == [[0, 1, 0, 1, 0, 0, 0, 0]] * 2
    assert calls[0]["control_type"].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]] * 2


def test_a_picture_of_another_size_is_fitted_to_the_size_that_is_drawn() -> None:
    request = parse_request({**JOB, "height": 96, "width": 64})
    large = control_picture(128, 192)
    small = large.resize((64, 96), Image.Resampling.LANCZOS)
    one, other = (
        draw_controlled(request, models(), [control(map=each)])[0] for each in (large, small)
    )
    assert same(one, other)


@pytest.mark.parametrize("mask", [None, HOLE], ids=["redrawn", "masked"])
def test_a_batch_gives_the_pictures_of_single_requests(mask: Any) -> None:
    canvas = canvas_of(PICTURE, mask)
    job = {**REDRAW, **(MASK if mask is not None else {}), "scheduler": "K_EULER_ANCESTRAL"}
    controls = [control(map=SMALL_MAP), control(single(), None, map=SMALL_MAP, end=0.5)]
    batch = draw_controlled(parse_request({**job, "num_images": 3}), models(), controls, canvas)
    for i, one in enumerate(batch):
        [alone] = draw_controlled(parse_request({**job, "seed": 3 + i}), models(), controls, canvas)
        assert largest_difference(one, alone) <= 2
    assert difference(batch[0], batch[1]) > 0.5


def test_each_batch_of_a_job_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    request = parse_request({**JOB, "num_images": 3})
    together = draw_controlled(request, models(), [control(end=0.5)])
    monkeypatch.setattr(
        batches, "plan", lambda *_, **__: Plan(batch_size=2, slicing=False, tiling=False)
    )
    with calls_of(union()) as calls:
        apart = draw_controlled(request, models(), [control(end=0.5)])
    assert [len(call["sample"]) for call in calls] == [4, 4, 2, 2]
    for one, other in zip(together, apart, strict=True):
        assert largest_difference(one, other) <= 1


class TestUnetForInpainting:
    @pytest.fixture(scope="class")
    @staticmethod
    def wide(tmp_path_factory: pytest.TempPathFactory) -> Models:
        folder = inpainting_model.write(tmp_path_factory.mktemp("wide") / "model")
        return load_models(find_model_dir(Settings(model_dir=folder)))

    def test_the_controlnet_sees_the_latents_alone(self, wide: Models) -> None:
        request = parse_request({**REDRAW, **MASK})
        with calls_of(union()) as calls:
            draw_controlled(request, wide, [control(map=SMALL_MAP)], canvas_of(PICTURE, HOLE))
        assert {tuple(call["sample"].shape) for call in calls} == {(2, 4, 16, 12)}

    @pytest.mark.parametrize("name", NAMES)
    def test_it_inpaints_as_in_plain_diffusers(self, name: str, wide: Models) -> None:
        scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(CONFIG)
        pipeline = StableDiffusionXLControlNetInpaintPipeline.from_pipe(
            plain_base(), unet=wide.unet, controlnet=single(), scheduler=scheduler
        )
        pipeline.set_progress_bar_config(disable=True)
        [expected] = pipeline(
            prompt=PROMPT,
            guidance_scale=7.5,
            image=PICTURE,
            mask_image=Image.fromarray(HOLE),
            control_image=SMALL_MAP,
            controlnet_conditioning_scale=0.8,
            strength=0.6,
            num_inference_steps=8,
            height=128,
            width=96,
            generator=[torch.Generator("cpu").manual_seed(3)],
        ).images
        request = parse_request({**REDRAW, **MASK, "scheduler": name})
        [got] = draw_controlled(
            request, wide, [control(single(), None, map=SMALL_MAP)], canvas_of(PICTURE, HOLE)
        )
        assert largest_difference(got, expected) <= 1


class StoppedError(Exception):
    """As a job that is cancelled ends."""


def test_nothing_stays_whether_the_job_succeeds_fails_or_is_cancelled() -> None:
    request = parse_request(JOB)
    plain_bytes = draw(request, models())[0].tobytes()
    controls = [control(), control(single(), None)]
    expected = draw_controlled(request, models(), controls)[0].tobytes()
    assert draw(request, models())[0].tobytes() == plain_bytes

    def stop(step: Step) -> None:
        if step.step == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        draw_controlled(parse_request({**JOB, "seed": 8}), models(), controls, on_step=stop)
    assert draw(request, models())[0].tobytes() == plain_bytes

    wrong = control(single(), None, map=None)
    with pytest.raises(AttributeError):
        draw_controlled(request, models(), [*controls, wrong])
    assert draw(request, models())[0].tobytes() == plain_bytes
    assert draw_controlled(request, models(), controls)[0].tobytes() == expected
    unet = models().unet
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks
