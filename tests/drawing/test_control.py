"""ControlNets: as in plain diffusers, in every way of drawing, and gone afterwards."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
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

from sdxl_worker.adapters.of_request import read_adapters
from sdxl_worker.drawing import batches
from sdxl_worker.drawing import control as control_module
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.control import warnings_of_controls
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steps import Step
from sdxl_worker.inputs.references import References
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.serving.beside import find_beside, steering_of
from sdxl_worker.settings import Settings
from tests import inpainting_model
from tests.adapters.lora_files import saved
from tests.control_networks import (
    control,
    control_picture,
    draw_controlled,
    single,
    union,
    write,
)
from tests.own_files import write_lora
from tests.support import (
    PROMPT,
    SCHEDULERS,
    canvas_of,
    difference,
    draw,
    largest_difference,
    load,
    models,
    noise_picture,
    plain_base,
    weights_being_read,
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


@pytest.mark.parametrize("name", [*SCHEDULERS, "Heun", "LCM", "TCD"])
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


@pytest.mark.parametrize(
    ("share", "fields", "has_effect"),
    [
        ({"end": 0.1}, {}, False),
        ({"start": 0.5, "end": 0.65}, {}, False),
        ({"end": 0.2}, {}, True),
        ({"start": 0.4, "end": 0.6}, {"high_noise_frac": 0.6}, True),
        ({"start": 0.6, "end": 0.8}, {"high_noise_frac": 0.6}, False),
        ({"start": 0.3, "end": 0.7}, {"hires": {"scale": 1, "steps": 9}}, True),
    ],
)
def test_one_that_counts_in_no_step_is_told(
    share: dict[str, Any], fields: dict[str, Any], has_effect: bool
) -> None:
    given = {"type": "canny", "image_url": "data:image/png;base64,", **share}
    request = parse_request({**JOB, "refiner_inference_steps": 5, "controlnet": [given], **fields})
    told = warnings_of_controls(request, plan_stages(request, models()))
    if has_effect:
        assert told == []
    else:
        [line] = told
        assert line.startswith("controlnet[0]: has no effect, for none of the base's steps lies")


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


def test_it_draws_with_a_lora_as_in_plain_diffusers(tmp_path: Path) -> None:
    """Which is for the base alone; the ControlNet has none."""
    path = write_lora(tmp_path / "style.safetensors", 1, texts=False)
    scheduler = diffusers.DDIMScheduler.from_config(CONFIG)
    pipeline = StableDiffusionXLControlNetUnionPipeline.from_pipe(
        plain_base(), controlnet=union(), scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    [expected] = pipeline(
        prompt=PROMPT,
        guidance_scale=7.5,
        generator=[torch.Generator("cpu").manual_seed(3)],
        control_image=[control_picture()],
        control_mode=[3],
        controlnet_conditioning_scale=0.8,
        num_inference_steps=5,
        height=128,
        width=128,
    ).images
    pipeline.unload_lora_weights()
    request = parse_request({**JOB, "scheduler": "DDIM", "loras": [{"path": path.name}]})
    adapters = read_adapters(request, {"loras[0].path": saved(path)}, models())
    [got] = draw_controlled(request, models(), [control()], adapters=adapters)
    assert largest_difference(got, expected) <= 1, "one adds to the weights, one to the outputs"
    [without] = draw_controlled(request, models(), [control()])
    assert difference(got, without) > 1


def test_of_scale_0_the_picture_is_the_plain_one_and_nothing_is_loaded(tmp_path: Path) -> None:
    write(union(), tmp_path / "union")
    entry = {"type": "canny", "image_url": "https://example.com/a.png", "scale": 0}
    request = parse_request({**JOB, "controlnet": [entry]})
    beside = find_beside(request, Settings(controlnet_dir=tmp_path), models())
    loaded: list[str] = []
    steering = steering_of(
        request,
        beside,
        References(controls=(control_picture(),)),
        models(),
        loaded.append,
        lambda: None,
    )
    assert steering.controls == ()
    assert loaded == []
    [got] = draw_controlled(request, models(), steering.controls)
    assert same(got, draw(parse_request(JOB), models())[0])
    # And where it is drawn with all the same, it changes nothing.
    [drawn] = draw_controlled(request, models(), [control(scale=0.0)])
    assert same(got, drawn)


def test_a_job_is_drawn_with_what_its_request_asks_for(tmp_path: Path) -> None:
    write(union(), tmp_path / "union")
    write(single(), tmp_path / "pose")
    url = "https://example.com/a.png"
    request = parse_request(
        {
            **JOB,
            "controlnet": [
                {"type": "canny", "image_url": url, "scale": 0.5, "end": 0.6},
                {"type": "openpose", "image_url": url, "preprocess": False, "start": 0.2},
            ],
        }
    )
    beside = find_beside(request, Settings(controlnet_dir=tmp_path), models())
    maps = (control_picture(), control_picture(seed=6))
    loaded: list[str] = []
    steering = steering_of(
        request, beside, References(controls=maps), models(), loaded.append, lambda: None
    )
    assert loaded == ["the ControlNet union", "the ControlNet pose"]
    [got] = draw_controlled(request, models(), steering.controls)
    expected = [
        control(mode=3, map=maps[0], scale=0.5, end=0.6),
        control(single(), None, map=maps[1], scale=1.0, start=0.2),
    ]
    assert same(got, draw_controlled(request, models(), expected)[0])


class TestWhereNetworksTakeTurns:
    def test_it_is_on_the_device_from_its_first_step_to_its_last(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And leaves before steps in which it does not count, and when the job ends early."""
        seen: list[str] = []

        @contextlib.contextmanager
        def at_work(*_: Any) -> Iterator[None]:
            seen.append("comes")
            try:
                yield
            finally:
                seen.append("goes")

        monkeypatch.setattr(control_module, "at_work", at_work)
        request = parse_request(JOB)

        def note(step: Step) -> None:
            seen.append(str(step.step))

        controls = [control(end=0.4), control(mode=1, end=0.6)]
        draw_controlled(request, models(), controls, on_step=note)
        assert seen == ["comes", "1", "2", "goes", "3", "4", "5"]
        seen.clear()

        def stop(_: Step) -> None:
            raise StoppedError

        with pytest.raises(StoppedError):
            draw_controlled(request, models(), controls, on_step=stop)
        assert seen == ["comes", "goes"]
        seen.clear()
        draw_controlled(request, models(), [control(start=0.3, end=0.35)])
        assert seen == []

    def test_the_picture_is_the_same(self) -> None:
        placement = Placement(torch.device("cpu", 0), torch.float32, resident=False)
        offloaded = load(dataclasses.replace(weights_being_read(), placement=placement))
        request = parse_request({**JOB, "high_noise_frac": 0.5, "refiner_inference_steps": 4})
        controls = [control(), control(single(), None)]
        [got] = draw_controlled(request, offloaded, controls)
        assert same(got, draw_controlled(request, models(), controls)[0])


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
