"""The samplers by the names of worker-sdxl 2.1.0."""

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from sdxl_worker.request import SchedulerName

SCHEDULERS: dict[SchedulerName, type[SchedulerMixin]] = {
    "PNDM": PNDMScheduler,
    "KLMS": LMSDiscreteScheduler,
    "DDIM": DDIMScheduler,
    "K_EULER": EulerDiscreteScheduler,
    "K_EULER_ANCESTRAL": EulerAncestralDiscreteScheduler,
    "DPMSolverMultistep": DPMSolverMultistepScheduler,
    "DPMSolverSinglestep": DPMSolverSinglestepScheduler,
}


def build_scheduler(name: SchedulerName, config: Mapping[str, Any]) -> SchedulerMixin:
    """A new scheduler for one stage of one job.

    Always from the configuration as it was loaded, never from that of a scheduler that ran: what
    one job sets would stay for the next, and some classes change their own configuration.
    """
    return SCHEDULERS[name].from_config(dict(config))
