"""Whatever begins in the middle of a schedule: the refiner, the ensemble's second half.

An ideal denoiser knows the one picture that there is, and so the noise. From any place of a
schedule and with any sampler, following it leads to that picture: a step that is too short or too
long shows at the end.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdxl_worker.drawing.schedulers import build_scheduler
from sdxl_worker.samplers import SAMPLERS, SamplerName, ScheduleName
from shapes.captions import full_prompts
from shapes.judge import judge
from tests.support import models, picture

STEPS = 25


def begun(
    name: SamplerName,
    *,
    first_step: int,
    steps: int = STEPS,
    schedule: ScheduleName | None = None,
    **config: Any,
) -> tuple[Any, torch.Tensor]:
    """A scheduler that is to begin with that step, and its timesteps, as the pipelines cut them."""
    scheduler = build_scheduler(
        name,
        {**models().scheduler_config, **config},
        begins_in_mid_schedule=first_step > 0,
        schedule=schedule,
    )
    scheduler.set_timesteps(steps, device="cpu")
    first = first_step * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler, scheduler.timesteps[first:]


def cut(
    name: SamplerName, steps: int, *, strength: float = 1, denoising_start: float | None = None
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
    shares = torch.cumprod(1 - betas(), dim=0).numpy()
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": [generator]} if "generator" in takes else {}
    latents = scheduler.add_noise(picture, noise, timesteps[:1])
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        predicted = noise
        if options:  # it may add noise of its own
            share = float(np.interp(timestep, np.arange(len(shares)), shares))
            predicted = (scaled - share**0.5 * picture) / (1 - share) ** 0.5
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
def test_an_ideal_denoiser_is_followed_to_its_picture(name: SamplerName, first_step: int) -> None:
    assert residue(*begun(name, first_step=first_step)) < 0.05


@pytest.mark.parametrize(
    ("steps", "first_step"), [(1, 0), (2, 0), (4, 0), (25, 0), (4, 3), (25, 12), (25, 24)]
)
@pytest.mark.parametrize(
    ("name", "schedule"), [(name, one) for name, it in SAMPLERS.items() for one in it.schedules]
)
def test_so_it_is_with_every_schedule(
    name: SamplerName, schedule: ScheduleName, steps: int, first_step: int
) -> None:
    assert residue(*begun(name, first_step=first_step, steps=steps, schedule=schedule)) < 0.05


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        (name, schedule)
        for name in ("K_EULER", "DPMSolverMultistep", "UniPC", "KLMS")
        for schedule in SAMPLERS[name].schedules
    ],
)
def test_a_thousand_steps_of_a_schedule_arrive(name: SamplerName, schedule: ScheduleName) -> None:
    scheduler, timesteps = begun(name, first_step=0, steps=1000, schedule=schedule)
    assert 0 <= timesteps.min() <= timesteps.max() < 1000
    # The weights of LMS hardly differ there, and their difference is rounded.
    assert residue(scheduler, timesteps) < (0.1 if name == "KLMS" else 0.05)


# With SDXL's configuration they end at the noise of timestep 0.
AT_TIMESTEP_0 = ("DDIM", "PNDM", "DEIS")
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
    name: SamplerName, steps: int, where: dict[str, Any]
) -> None:
    scheduler, timesteps = cut(name, steps, **where)
    assert 0 <= timesteps.min() <= timesteps.max() < scheduler.config.num_train_timesteps
    latents, expected, noise = followed(scheduler, timesteps)
    if name in AT_TIMESTEP_0:
        expected = scheduler.add_noise(expected, noise, torch.tensor([0]))
    # A few end at timestep 0 with noise of their own, LCM where so many steps lead there.
    of_its_own = name in ("SASolver", "TCD") or (name == "LCM" and steps > 900)
    atol = 0.2 if of_its_own else 5e-3 if name == "DEIS" else 1e-4
    torch.testing.assert_close(latents, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["KLMS", "PNDM"])
def test_diffusers_own_would_not_arrive(name: SamplerName) -> None:
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
    name: SamplerName, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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
    name: SamplerName, high_noise_frac: float
) -> None:
    """Of these eight, diffusers' own KLMS gets four right at 0.9."""
    right = 0
    for i, (prompt, _) in enumerate(full_prompts(8, seed=1000)):
        drawn = picture(
            prompt=prompt, seed=1000 + i, scheduler=name, high_noise_frac=high_noise_frac
        )
        right += judge(drawn).matches(prompt)
    assert right == 8
