"""The samplers by the names of worker-sdxl 2.1.0."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import SchedulerMixin

from sdxl_worker.request import SchedulerName
from sdxl_worker.speed.no_waits import host_noise, keep_tables_on_host


@dataclass(frozen=True)
class Sampler:
    module: str
    """In diffusers.schedulers. Imported only when needed: that of KLMS imports scipy."""
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """What replaces values of the model's own configuration."""
    begin_in_mid_schedule: Callable[[Any], None] | None = None
    """Prepares a new scheduler to begin with a later step than the first of its schedule."""

    def load_class(self) -> type[SchedulerMixin]:
        module = importlib.import_module(f"diffusers.schedulers.{self.module}")
        if self.class_name == "LMSDiscreteScheduler":
            # The module lacks it if `sparing_imports` hid scipy.
            vars(module)["integrate"] = importlib.import_module("scipy.integrate")
        if self.class_name == "EulerAncestralDiscreteScheduler":
            vars(module)["randn_tensor"] = host_noise
        return getattr(module, self.class_name)


def build_scheduler(
    name: SchedulerName, config: Mapping[str, Any], *, begins_in_mid_schedule: bool
) -> Any:
    """A new scheduler for one stage of one job.

    It is made from the configuration as it was loaded, never from that of a scheduler that ran:
    what one job sets would stay for the next, and some classes change their own configuration.

    Args:
        begins_in_mid_schedule: whether its first step is not the first one of its schedule.
    """
    sampler = SAMPLERS[name]
    scheduler: Any = sampler.load_class().from_config({**config, **sampler.config})
    keep_tables_on_host(scheduler)
    _stay_within_training(scheduler)
    if begins_in_mid_schedule and sampler.begin_in_mid_schedule is not None:
        sampler.begin_in_mid_schedule(scheduler)
    return scheduler


def _stay_within_training(scheduler: Any) -> None:
    """With "leading" spacing, SDXL's, a schedule of some 1000 steps begins beyond the last timestep
    that the model was trained with, or comes out as one timestep over and over: diffusers then
    looks outside its tables, or divides by zero. With "trailing" spacing 1000 steps fit.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def within_training(*args: Any, **options: Any) -> None:
        set_timesteps(*args, **options)
        timesteps = scheduler.timesteps
        if not len(timesteps) - 1 <= timesteps[0] < scheduler.config.num_train_timesteps:
            scheduler.register_to_config(timestep_spacing="trailing")
            set_timesteps(*args, **options)

    scheduler.set_timesteps = within_training


def _take_the_order_that_is_held(scheduler: Any) -> None:
    """A linear multistep method of order n weighs the derivatives of the last n steps.

    diffusers takes the order from the place in the schedule: four in the middle, even if the first
    step is there. Without the other derivatives the weights do not add up to the step.
    """
    step = scheduler.step

    @functools.wraps(step)
    def step_with_order(*args: Any, **options: Any) -> Any:
        return step(*args, **options, order=min(len(scheduler.derivatives) + 1, LMS_ORDER))

    scheduler.step = step_with_order


def _begin_without_repeating(scheduler: Any) -> None:
    """PNDM makes up for the history it lacks by doing its first step twice, at a repeated
    timestep. Only a whole schedule repeats it; in a part of one, diffusers takes the second step
    for the repetition, and all later steps then expect less noise than there is.

    So begin with order one, as the other multistep schedulers do, and raise it with each step.
    """
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    # Runge-Kutta steps, which some configurations begin with, repeat timesteps as well.
    scheduler.register_to_config(skip_prk_steps=True)

    @functools.wraps(set_timesteps)
    def without_repetition(*args: Any, **options: Any) -> None:
        set_timesteps(*args, **options)
        scheduler.timesteps = torch.unique_consecutive(scheduler.timesteps)

    @functools.wraps(step)
    def step_once(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        scheduler.counter = max(scheduler.counter, 2)  # 1 is for the repetition
        return result

    scheduler.set_timesteps, scheduler.step = without_repetition, step_once


LMS_ORDER = 4

SAMPLERS: dict[SchedulerName, Sampler] = {
    "PNDM": Sampler(
        "scheduling_pndm", "PNDMScheduler", begin_in_mid_schedule=_begin_without_repeating
    ),
    "KLMS": Sampler(
        "scheduling_lms_discrete",
        "LMSDiscreteScheduler",
        begin_in_mid_schedule=_take_the_order_that_is_held,
    ),
    "DDIM": Sampler("scheduling_ddim", "DDIMScheduler"),
    "K_EULER": Sampler("scheduling_euler_discrete", "EulerDiscreteScheduler"),
    "K_EULER_ANCESTRAL": Sampler(
        "scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler"
    ),
    "DPMSolverMultistep": Sampler("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"),
    "DPMSolverSinglestep": Sampler(
        "scheduling_dpmsolver_singlestep", "DPMSolverSinglestepScheduler"
    ),
}
