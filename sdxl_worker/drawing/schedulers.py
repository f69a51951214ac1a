"""The samplers by the names of worker-sdxl 2.1.0."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import SchedulerMixin

from sdxl_worker.request import SchedulerName
from sdxl_worker.speed.no_waits import host_noise, keep_tables_on_host


@dataclass(frozen=True)
class Sampler:
    module: str
    """In diffusers.schedulers. Imported when it is asked for: KLMS takes scipy along."""
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """What takes the place of the model's own configuration."""

    def load_class(self) -> type[SchedulerMixin]:
        module = importlib.import_module(f"diffusers.schedulers.{self.module}")
        if "integrate" in vars(module) or self.class_name == "LMSDiscreteScheduler":
            # The module did without it where `sparing_imports` had hidden it.
            vars(module)["integrate"] = importlib.import_module("scipy.integrate")
        if self.class_name == "EulerAncestralDiscreteScheduler":
            vars(module)["randn_tensor"] = host_noise
        return getattr(module, self.class_name)


SAMPLERS: dict[SchedulerName, Sampler] = {
    "PNDM": Sampler("scheduling_pndm", "PNDMScheduler"),
    "KLMS": Sampler("scheduling_lms_discrete", "LMSDiscreteScheduler"),
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


def build_scheduler(name: SchedulerName, config: Mapping[str, Any]) -> SchedulerMixin:
    """A new scheduler for one stage of one job.

    Always from the configuration as it was loaded, never from that of a scheduler that ran: what
    one job sets would stay for the next, and some classes change their own configuration.
    """
    sampler = SAMPLERS[name]
    scheduler = sampler.load_class().from_config({**config, **sampler.config})
    keep_tables_on_host(scheduler)
    return scheduler
