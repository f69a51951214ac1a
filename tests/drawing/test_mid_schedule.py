"""Whatever begins in the middle of a schedule: the refiner, the ensemble's second half.

An ideal denoiser knows the one picture that there is, and so the noise. From any place of a
schedule and with any sampler, following it leads to that picture: a step that is too short or too
long shows at the end.
"""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from sdxl_worker.drawing.schedulers import SAMPLERS, build_scheduler
from sdxl_worker.request import SchedulerName
from shapes.captions import full_prompts
from shapes.judge import judge
from tests.support import models, picture

STEPS = 25


def begun(name: SchedulerName, *, first_step: int, **config: Any) -> tuple[Any, torch.Tensor]:
    """A scheduler that is to begin with that step, and its timesteps, as the pipelines cut them."""
    scheduler = build_scheduler(
        name, {**models().scheduler_config, **config}, begins_in_mid_schedule=first_step > 0
    )
    scheduler.set_timesteps(STEPS, device="cpu")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first_step)
    return scheduler, scheduler.timesteps[first_step:]


def cut(
    name: SchedulerName, steps: int, *, strength: float = 1, denoising_start: float | None = None
) -> tuple[Any, torch.Tensor]:
    """A scheduler and its timesteps, cut by diffusers' own image-to-image pipeline."""
    in_mid_schedule = strength < 1 or denoising_start is not None
    scheduler = build_scheduler(
        name, models().scheduler_config, begins_in_mid_schedule=in_mid_schedule
    )
    scheduler.set_timesteps(steps, device="cpu")
    pipeline: Any = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = diffusers.StableDiffusionXLImg2ImgPipeline.get_timesteps(
        pipeline, steps, strength, "cpu", denoising_start=denoising_start
    )
    return scheduler, timesteps


def followed(scheduler: Any, timesteps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where an ideal denoiser leads, the picture it knows, and the noise."""
    generator = torch.Generator("cpu").manual_seed(0)
    picture, noise = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    cumulated = torch.cumprod(1 - betas(), dim=0)
    ancestral = "Ancestral" in type(scheduler).__name__
    options = {"generator": generator} if ancestral else {}
    latents = scheduler.add_noise(picture, noise, timesteps[:1])
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        predicted = noise
        if ancestral:  # it adds noise of its own
            share = cumulated[timestep.round().long()]
            predicted = (scaled - share.sqrt() * picture) / (1 - share).sqrt()
        latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0]
    return latents, picture, noise


def residue(scheduler: Any, timesteps: torch.Tensor) -> float:
    """What is left of the noise at the end, as a share of what a picture of unit variance has."""
    latents, picture, _ = followed(scheduler, timesteps)
    return float((latents - picture).std())


def betas() -> torch.Tensor:
    config = models().scheduler_config
    ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    return torch.linspace(*ends, config["num_train_timesteps"]) ** 2


@pytest.mark.parametrize("first_step", [0, 1, 2, 12, 20, 22, 24])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_ideal_denoiser_is_followed_to_its_picture(name: SchedulerName, first_step: int) -> None:
    assert residue(*begun(name, first_step=first_step)) < 0.05


CUTS: list[dict[str, Any]] = [
    {"strength": 0.75},
    {"strength": 0.3},
    {"strength": 0.1},
    {"strength": 0.04},  # one step
    {"denoising_start": 0.8},
    {"denoising_start": 0.9},
]


@pytest.mark.parametrize(
    ("steps", "where"),
    [*((STEPS, where) for where in CUTS), *((50, where) for where in CUTS), (2, CUTS[0])]
    + [(steps, where) for steps in (999, 1000) for where in ({}, *CUTS[:2])],
    ids=str,
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_arrives_exactly_wherever_the_pipelines_let_it_begin(
    name: SchedulerName, steps: int, where: dict[str, Any]
) -> None:
    scheduler, timesteps = cut(name, steps, **where)
    assert 0 <= timesteps.min() <= timesteps.max() < scheduler.config.num_train_timesteps
    latents, expected, noise = followed(scheduler, timesteps)
    if name in ("DDIM", "PNDM"):  # with SDXL's configuration they end at the noise of timestep 0
        expected = scheduler.add_noise(expected, noise, torch.tensor([0]))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["KLMS", "PNDM"])
def test_diffusers_own_would_not_arrive(name: SchedulerName) -> None:
    """So that the test above is one, and the cure is known to be needed still."""
    plain = getattr(diffusers, SAMPLERS[name].class_name).from_config(
        dict(models().scheduler_config)
    )
    plain.set_timesteps(STEPS)
    first_step = 22
    if hasattr(plain, "set_begin_index"):
        plain.set_begin_index(first_step)
    assert residue(plain, plain.timesteps[first_step:]) > 0.1


@pytest.mark.parametrize("first_step", [0, 12, 20])
def test_klms_takes_no_higher_an_order_than_it_holds_derivatives(
    first_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, timesteps = begun("KLMS", first_step=first_step)
    orders: list[int] = []
    weigh = scheduler.get_lms_coefficient

    def noted(order: int, *place: int) -> float:
        orders.append(order)
        return weigh(order, *place)

    monkeypatch.setattr(scheduler, "get_lms_coefficient", noted)
    residue(scheduler, timesteps)
    of_steps = [1, 2, 3] + [4] * (len(timesteps) - 3)
    assert orders == [order for order in of_steps for _ in range(order)]


@pytest.mark.parametrize("first_step", [1, 12, 20])
def test_pndm_begins_with_order_one_and_takes_each_step_once(first_step: int) -> None:
    scheduler, timesteps = begun("PNDM", first_step=first_step)
    assert len(timesteps) == len(set(timesteps.tolist())) == STEPS - first_step
    held: list[int] = []
    step = scheduler.step

    def noted(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        held.append(len(scheduler.ets))
        return result

    scheduler.step = noted
    residue(scheduler, timesteps)
    assert held == [1, 2, 3] + [4] * (len(timesteps) - 3)


def test_pndm_from_its_first_step_repeats_one_as_ever() -> None:
    _, timesteps = begun("PNDM", first_step=0)
    assert timesteps.tolist()[:3] == [961, 921, 921]


def test_pndm_needs_no_runge_kutta_steps_in_mid_schedule() -> None:
    assert residue(*begun("PNDM", first_step=12, skip_prk_steps=False)) < 0.05


@pytest.mark.parametrize("where", CUTS, ids=str)
@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep"])
def test_dpm_solvers_begin_with_order_one(
    name: SchedulerName, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, timesteps = cut(name, STEPS, **where)
    orders: list[int] = []
    for order, update in ((1, "dpm_solver_first_order_update"), (2, SECOND_ORDER[name])):
        original = getattr(scheduler, update)

        def noted(*args: Any, order: int = order, original: Any = original, **more: Any) -> Any:
            orders.append(order)
            return original(*args, **more)

        monkeypatch.setattr(scheduler, update, noted)
    residue(scheduler, timesteps)
    assert orders[0] == orders[-1] == 1  # the last leads to no noise at all
    assert len(timesteps) < 3 or 2 in orders


SECOND_ORDER = {
    "DPMSolverMultistep": "multistep_dpm_solver_second_order_update",
    "DPMSolverSinglestep": "singlestep_dpm_solver_second_order_update",
}


@pytest.mark.parametrize("high_noise_frac", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("name", ["KLMS", "PNDM"])
def test_pictures_handed_over_in_mid_schedule_show_what_was_asked(
    name: SchedulerName, high_noise_frac: float
) -> None:
    """Of these eight, diffusers' own KLMS gets four right at 0.9."""
    right = 0
    for i, (prompt, _) in enumerate(full_prompts(8, seed=1000)):
        drawn = picture(
            prompt=prompt, seed=1000 + i, scheduler=name, high_noise_frac=high_noise_frac
        )
        right += judge(drawn).matches(prompt)
    assert right == 8
