"""The samplers: a new one for each stage, from the configuration as it was loaded."""

import dataclasses
from typing import Any

import pytest
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps

from sdxl_worker.drawing import schedulers
from sdxl_worker.drawing.schedulers import SAMPLERS, build_scheduler
from tests.support import (
    PROMPT,
    SCHEDULERS,
    models,
    run,
)

BASE_ONLY = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 8, "refiner_inference_steps": 0}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("K_EULER", {"timesteps": [999, 499]}),
        ("K_EULER", {"sigmas": [14.6, 1.0, 0.0]}),
        ("DPMSolverMultistep", {"timesteps": [999, 499]}),
    ],
)
@pytest.mark.parametrize("in_mid_schedule", [False, True])
def test_a_schedule_of_one_s_own_is_taken_where_the_sampler_can(
    name: Any, given: dict[str, Any], in_mid_schedule: bool
) -> None:
    scheduler = build_scheduler(
        name, models().scheduler_config, begins_in_mid_schedule=in_mid_schedule
    )
    timesteps, count = retrieve_timesteps(scheduler, device="cpu", **given)
    assert count == len(timesteps) == 2
    if "timesteps" in given:
        assert timesteps.tolist() == given["timesteps"]


def test_a_schedule_of_one_s_own_is_refused_where_the_sampler_cannot() -> None:
    scheduler = build_scheduler("DDIM", models().scheduler_config, begins_in_mid_schedule=False)
    with pytest.raises(ValueError, match="does not support custom"):
        retrieve_timesteps(scheduler, device="cpu", timesteps=[999, 499])


def test_a_variant_s_configuration_takes_the_place_of_the_model_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variant = dataclasses.replace(SAMPLERS["K_EULER"], config={"timestep_spacing": "trailing"})
    monkeypatch.setattr(schedulers, "SAMPLERS", {**SAMPLERS, "K_EULER": variant})
    scheduler = build_scheduler("K_EULER", models().scheduler_config, begins_in_mid_schedule=False)
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_schedulers_are_built_from_the_loaded_configuration_alone() -> None:
    before = dict(models().scheduler_config)
    for name in SCHEDULERS:
        run({**BASE_ONLY, "num_inference_steps": 2, "scheduler": name})
    assert dict(models().scheduler_config) == before
    with pytest.raises(TypeError):
        models().scheduler_config["beta_start"] = 1.0  # type: ignore[index]
