"""What holds of jobs holds in every mode: progress, previews, stopping, checks, formats, and that a
picture's file makes it again."""

import asyncio
import base64
import functools
import io
import itertools
import json
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import handler
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing.steps import Step
from sdxl_worker.serving import progress as progress_module
from sdxl_worker.serving.progress import JobStopped, Progress
from tests.serving.conftest import Platform
from tests.support import (
    PROMPT,
    data_uri,
    decoded,
    difference,
    largest_difference,
    noise_picture,
    pictures,
    replace_generate,
    run,
)

SIZE = (88, 72)
HOLE = (8, 24, 47, 55)
# Of what comes out in modes that enlarge it.
LARGER = {"hires and upscale": (163, 134), "hires, inpaint, ensemble": (114, 94)}


def _picture() -> Image.Image:
    picture = noise_picture(*SIZE)
    ImageDraw.Draw(picture).ellipse((20, 20, 60, 60), fill="red")
    return picture


def _mask() -> Image.Image:
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).rectangle(HOLE, fill=255)
    return mask


def _with_a_hole() -> Image.Image:
    picture, opacity = _picture(), _mask().point(lambda level: 255 - level)
    picture.putalpha(opacity)
    return picture


PICTURE = {"image_url": data_uri(_picture())}
STEPS = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 4, "refiner_inference_steps": 6}
# By what is asked for: fields, and the stages that it takes.
MODES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "text to image": ({"height": 72, "width": 88}, ["base", "refiner"]),
    "ensemble": ({"height": 72, "width": 88, "high_noise_frac": 0.5}, ["base", "refiner"]),
    "refine, without mode": (PICTURE, ["refiner"]),
    "refine": ({**PICTURE, "mode": "refine"}, ["refiner"]),
    "img2img": (
        {
            "image_url": data_uri(_picture().crop((0, 0, 60, 72))),
            "mode": "img2img",
            **{"height": 72, "width": 88, "fit": "pad", "refiner_strength": 0.5},
        },
        ["base", "refiner"],
    ),
    "img2img, ensemble": (
        {**PICTURE, "mode": "img2img", "high_noise_frac": 0.5},
        ["base", "refiner"],
    ),
    "inpaint": (
        {**PICTURE, "mask_url": data_uri(_mask()), "mask_blur": 3},
        ["base", "refiner"],
    ),
    "inpaint, only masked": (
        {
            **PICTURE,
            "mask_url": data_uri(_mask().point(lambda level: 255 - level)),
            "mask_invert": True,
            "mask_padding": 8,
        },
        ["base", "refiner"],
    ),
    "inpaint, from alpha": (
        {"image_url": data_uri(_with_a_hole()), "mask_from_alpha": True},
        ["base", "refiner"],
    ),
    "hires and upscale": (
        {"height": 72, "width": 88, "hires": {"strength": 0.5}, "upscale": {"factor": 1.2}},
        ["base", "hires", "refiner"],
    ),
    "hires, inpaint, ensemble": (
        {
            **PICTURE,
            "mask_url": data_uri(_mask()),
            "high_noise_frac": 0.5,
            "hires": {"strength": 0.8, "scale": 1.3},
        },
        ["base", "hires", "refiner"],
    ),
}
in_every_mode = pytest.mark.parametrize("mode", MODES)


def job_input(mode: str, **fields: Any) -> dict[str, Any]:
    return {**STEPS, **MODES[mode][0], **fields}


@functools.cache
def three(mode: str) -> list[Image.Image]:
    """The pictures of a request for three, which several tests look at."""
    return pictures(**job_input(mode, num_images=3))


def text_of(picture: Any) -> dict[str, str]:
    """The text chunks of its PNG."""
    return picture.text


@in_every_mode
def test_progress_names_the_stages_and_goes_up_to_100_with_previews(
    mode: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_UPDATES", 0.0)
    steps: list[Step] = []
    on_step = Progress.on_step

    def recorded(progress: Progress, step: Step) -> None:
        steps.append(step)
        on_step(progress, step)

    monkeypatch.setattr(Progress, "on_step", recorded)
    output = run(job_input(mode, preview=True))
    assert list(output) == ["images", "image_url", "seed"]
    assert list(dict.fromkeys(step.stage for step in steps)) == MODES[mode][1]
    percents = [step.percent for step in steps]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    for stage in MODES[mode][1]:
        of_stage = [(step.step, step.steps) for step in steps if step.stage == stage]
        assert of_stage == [(i + 1, len(of_stage)) for i in range(len(of_stage))]
    assert platform.updates
    width, height = decoded(output["images"][0]).size
    for _, _, body in platform.updates:
        assert body["output"]["progress"]["stage"] in MODES[mode][1]
        header, _, payload = body["output"]["preview"].partition(",")
        assert header == "data:image/jpeg;base64"
        preview = Image.open(io.BytesIO(base64.b64decode(payload)))
        preview.load()
        assert preview.format == "JPEG"
        if mode != "inpaint, only masked":  # of which the part is shown that is painted
            assert preview.width / preview.height == pytest.approx(width / height, rel=0.1)


@in_every_mode
def test_a_stopped_job_leaves_within_a_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generate: Any = generate_module.generate
    steps: list[str] = []
    ended = threading.Event()

    def recorded(*arguments: Any, **options: Any) -> Any:
        *others, on_step = arguments

        def counted(step: Step) -> None:
            steps.append(step.stage)
            on_step(step)

        try:
            return generate(*others, counted, **options)
        except JobStopped:
            ended.set()
            raise

    replace_generate(monkeypatch, recorded)
    # In the last stage, which takes long enough to be stopped.
    last = MODES[mode][1][-1]
    long = {"refiner_inference_steps": 400}
    if "high_noise_frac" in MODES[mode][0]:
        long = {"num_inference_steps": 120}

    async def stop_one() -> None:
        job = {"id": "a", "input": job_input(mode, num_images=2, **long)}
        running = asyncio.create_task(handler.handler(job))
        while steps.count(last) < 2:
            assert not running.done(), running.result()
            await asyncio.sleep(0.002)
        running.cancel()
        at = len(steps)
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await asyncio.to_thread(ended.wait, 10)
        assert len(steps) - at <= 1

    asyncio.run(stop_one())


@in_every_mode
def test_a_check_reports_on_the_picture_that_is_asked_for(mode: str) -> None:
    report = run(job_input(mode, check=True, num_images=2))
    assert (report["width"], report["height"], report["seed"]) == (*LARGER.get(mode, SIZE), 7)
    assert report["steps"] > 0
    assert len(set(report["sha256"])) == 2
    assert len(json.dumps(report)) < 2000


@in_every_mode
def test_a_picture_of_several_is_what_it_is_alone(mode: str) -> None:
    for i, one in enumerate(three(mode)):
        [alone] = pictures(**job_input(mode, seed=7 + i))
        assert largest_difference(one, alone) <= 2, "more than rounding"
    for one, other in itertools.combinations(three(mode), 2):
        assert difference(one, other) > 0.1


@in_every_mode
def test_the_request_in_a_file_makes_its_picture_again(mode: str) -> None:
    def again(one: Image.Image) -> Image.Image:
        request = json.loads(text_of(one)["request"])
        # A file does not carry the pictures that were sent: only of which kind they are.
        sent = {name: MODES[mode][0][name] for name in ("image_url", "mask_url") if name in request}
        assert all(uri.startswith(f"{request[name]},") for name, uri in sent.items())
        assert {"image_url", "mask_url"} & set(MODES[mode][0]) == set(sent)
        [picture] = pictures(**{**request, **sent})
        return picture

    [alone] = pictures(**job_input(mode))
    repeated = again(alone)
    assert repeated.tobytes() == alone.tobytes()
    assert text_of(repeated) == text_of(alone)
    second = three(mode)[1]
    assert largest_difference(again(second), second) <= 2


@in_every_mode
def test_each_format_holds_the_same_picture(mode: str) -> None:
    [expected] = pictures(**job_input(mode))
    for output_format, quality, most in (
        ("jpeg", 95, 4.0),
        ("webp", 95, 6.0),
        ("webp", 100, 0),
    ):
        fields = {"output_format": output_format, "output_quality": quality}
        [uri] = run(job_input(mode, **fields))["images"]
        header, _, payload = uri.partition(",")
        assert header == f"data:image/{output_format};base64"
        image = Image.open(io.BytesIO(base64.b64decode(payload)))
        assert image.format == output_format.upper()
        assert image.size == LARGER.get(mode, SIZE)
        assert difference(image.convert("RGB"), expected) <= most


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("inpaint")])
def test_what_is_not_masked_stays_byte_for_byte(mode: str) -> None:
    left, top, right, bottom = HOLE
    reach = MODES[mode][0].get("mask_blur", 0)
    kept = np.ones(SIZE[::-1], bool)
    kept[top - reach : bottom + 1 + reach, left - reach : right + 1 + reach] = False
    before = np.asarray(Image.open(io.BytesIO(base64.b64decode(PICTURE["image_url"][22:]))))
    for one in three(mode):
        after = np.asarray(one)
        assert np.array_equal(after[kept], before[kept])
        assert not np.array_equal(after[~kept], before[~kept])


def test_no_white_shines_through_what_is_drawn_into_a_transparent_hole() -> None:
    """Transparency has no colour: the hole begins with those around it."""
    picture = Image.new("RGBA", (128, 128), (35, 70, 215, 255))
    picture.paste((0, 0, 0, 0), (40, 40, 88, 88))
    [drawn] = pictures(
        prompt="a blue background",
        image_url=data_uri(picture),
        mask_from_alpha=True,
        mask_blur=6,
        strength=0.1,
        num_inference_steps=10,
        seed=1,
    )
    distance = np.abs(np.asarray(drawn).astype(int) - (35, 70, 215)).max()
    assert distance < 60
