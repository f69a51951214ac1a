"""Which stages a request takes."""

import dataclasses
from typing import Any

import pytest
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from sdxl_worker.drawing.stages import Stage, output_size_px, plan_stages, total_steps
from sdxl_worker.errors import RequestError
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from tests.support import (
    PROMPT,
    canvas_of,
    data_uri,
    draw,
    largest_difference,
    models,
    noise_picture,
    picture,
    pictures,
)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def plan(with_models: Models | None = None, **job_input: Any) -> tuple[Stage, ...]:
    request = parse_request({"prompt": PROMPT, **job_input})
    return plan_stages(request, with_models or models())


def told(stages: tuple[Stage, ...]) -> list[tuple[str, type, int, set[str]]]:
    """Of each stage: whose networks, which pipeline, how many steps, and what cuts them."""
    cuts = {"denoising_end", "denoising_start", "strength"}
    return [
        (stage.name, stage.pipeline, stage.steps, cuts & set(stage.options)) for stage in stages
    ]


def base(steps: int = 25, cut: str = "") -> tuple[str, type, int, set[str]]:
    return "base", StableDiffusionXLPipeline, steps, {cut} - {""}


def refiner(steps: int, cut: str) -> tuple[str, type, int, set[str]]:
    return "refiner", StableDiffusionXLImg2ImgPipeline, steps, {cut}


def test_each_request_has_its_stages() -> None:
    url = "https://example.com/a.png"
    ensemble = [base(20, "denoising_end"), refiner(5, "denoising_start")]
    assert told(plan()) == [base(), refiner(15, "strength")]
    assert told(plan(refiner_inference_steps=0)) == [base()]
    assert told(plan(high_noise_frac=0.8)) == ensemble
    assert told(plan(high_noise_frac=0.8, strength=0)) == ensemble
    assert told(plan(high_noise_frac=0.8, refiner_inference_steps=0)) == [base()]
    assert told(plan(image_url=url)) == [refiner(15, "strength")]
    assert told(plan(image_url=url, high_noise_frac=0.8)) == [refiner(15, "strength")]
    assert told(plan(image_url=url, strength=0)) == []


def test_an_ensemble_is_one_schedule_cut_in_one_place() -> None:
    first, second = plan(high_noise_frac=0.8, num_inference_steps=10, refiner_inference_steps=40)
    assert first.options["denoising_end"] == second.options["denoising_start"] == 0.8
    assert first.options["num_inference_steps"] == second.options["num_inference_steps"] == 10


def test_the_steps_of_all_stages_are_counted() -> None:
    assert total_steps(plan()) == 25 + 15
    assert total_steps(plan(high_noise_frac=0.8, num_inference_steps=11)) == 11
    assert total_steps(plan(image_url="https://example.com/a.png", strength=0)) == 0


def test_the_size_is_the_input_picture_s_or_what_is_asked_for_or_the_model_s_own() -> None:
    image = Image.new("RGB", (96, 64))
    refine = plan(image_url="https://example.com/a.png")
    assert output_size_px(refine, canvas_of(image)) == (96, 64)
    assert output_size_px(plan(width=72), None) == (72, 128)
    assert output_size_px(plan(), None) == (128, 128)


@pytest.mark.parametrize(
    "job_input",
    [
        {"strength": 0},
        {"refiner_inference_steps": 3},  # int(3 * 0.3) == 0
        {"refiner_inference_steps": 1, "strength": 0.99},
    ],
)
def test_a_refiner_that_would_run_no_step_is_skipped(job_input: dict[str, Any]) -> None:
    base = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4}
    expected = picture(**base, refiner_inference_steps=0)
    assert same(picture(**base, **job_input), expected)
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    for unchanged in pictures(image_url=data_uri(image), num_images=2, **job_input):
        assert same(unchanged, image)


@pytest.mark.parametrize(
    ("job_input", "begins_in_mid_schedule"),
    [
        ({}, [False, True]),
        ({"strength": 1}, [False, False]),
        ({"high_noise_frac": 0.8}, [False, True]),
        ({"image_url": "https://example.com/a.png"}, [True]),
    ],
)
def test_a_stage_tells_whether_it_begins_in_mid_schedule(
    job_input: dict[str, Any], begins_in_mid_schedule: list[bool]
) -> None:
    stages = plan(**job_input)
    assert [stage.begins_in_mid_schedule for stage in stages] == begins_in_mid_schedule


def without_refiner() -> Models:
    return dataclasses.replace(models(), refiner_unet=None)


def test_a_worker_without_refiner_serves_the_base() -> None:
    assert told(plan(without_refiner())) == [base()]
    assert told(plan(without_refiner(), strength=0.5)) == [base()]
    assert told(plan(without_refiner(), refiner_inference_steps=0)) == [base()]


@pytest.mark.parametrize(
    "job_input",
    [
        {"image_url": "https://example.com/a.png"},
        {"high_noise_frac": 0.8},
        {"refiner_inference_steps": 20},
    ],
)
def test_a_worker_without_refiner_says_so_to_who_asks_for_it(job_input: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(job_input))}: needs the refiner"):
        plan(without_refiner(), **job_input)


V_PREDICTION = {"prediction_type": "v_prediction"}
OTHER_KINDS: dict[str, dict[str, Any]] = {
    "v-prediction": V_PREDICTION,
    "zero SNR": {**V_PREDICTION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "EDM": {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_beside_a_base_of_another_kind_the_refiner_still_predicts_noise(kind: str) -> None:
    own = models()
    config = {**own.scheduler_config, **OTHER_KINDS[kind]}
    other = dataclasses.replace(own, scheduler_config=config)
    assert other.kind != own.kind
    canvas = canvas_of(noise_picture(64, 64))
    job_input = {
        "prompt": PROMPT,
        "image_url": "https://example.com/a.png",
        "scheduler": "K_EULER",
        "refiner_inference_steps": 4,
        "strength": 0.6,
        "seed": 1,
    }
    request = parse_request(job_input)
    [refined], [expected] = (draw(request, one, canvas) for one in (other, own))
    assert largest_difference(refined, expected) <= 1


@pytest.mark.parametrize("kind", ["zero SNR", "EDM"])
def test_a_base_with_other_noise_levels_does_not_hand_over_to_the_refiner(kind: str) -> None:
    config = {**models().scheduler_config, **OTHER_KINDS[kind]}
    other = dataclasses.replace(models(), scheduler_config=config)
    with pytest.raises(RequestError, match="^high_noise_frac: .*other noise levels"):
        plan(other, scheduler="K_EULER", high_noise_frac=0.8)
