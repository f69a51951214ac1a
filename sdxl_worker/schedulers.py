"""The samplers by the names of worker-sdxl 2.1.0.

Their timesteps stay on the host. On the GPU, each comparison and each look into a table would make
the host wait for all steps so far, and the GPU wait for the next.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from sdxl_worker.request import SchedulerName

# In diffusers.schedulers. Imported when they are asked for: KLMS takes scipy along.
SCHEDULERS: dict[SchedulerName, str] = {
    "PNDM": "scheduling_pndm.PNDMScheduler",
    "KLMS": "scheduling_lms_discrete.LMSDiscreteScheduler",
    "DDIM": "scheduling_ddim.DDIMScheduler",
    "K_EULER": "scheduling_euler_discrete.EulerDiscreteScheduler",
    "K_EULER_ANCESTRAL": "scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler",
    "DPMSolverMultistep": "scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler",
    "DPMSolverSinglestep": "scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler",
}


def build_scheduler(name: SchedulerName, config: Mapping[str, Any]) -> SchedulerMixin:
    """A new scheduler for one stage of one job.

    Always from the configuration as it was loaded, never from that of a scheduler that ran: what
    one job sets would stay for the next, and some classes change their own configuration.
    """
    scheduler = scheduler_class(name).from_config(dict(config))
    set_timesteps = scheduler.set_timesteps
    # The pipelines name the GPU as the tables' device.
    scheduler.set_timesteps = lambda steps, device: set_timesteps(steps)  # noqa: ARG005
    return scheduler


def scheduler_class(name: SchedulerName) -> type[SchedulerMixin]:
    module_name, _, class_name = SCHEDULERS[name].partition(".")
    module = importlib.import_module(f"diffusers.schedulers.{module_name}")
    if name == "KLMS":
        # The module did without it where `sparing_imports` had hidden it.
        vars(module)["integrate"] = importlib.import_module("scipy.integrate")
    if name == "K_EULER_ANCESTRAL":
        vars(module)["randn_tensor"] = _noise
    return getattr(module, class_name)


def _noise(
    shape: torch.Size,
    generator: list[torch.Generator],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As diffusers' `randn_tensor` draws it with generators of the host, without its wait for the
    GPU in each step: only from pinned memory can a copy be queued like all else."""
    noise = randn_tensor(tuple(shape), generator, torch.device("cpu"), dtype)
    return noise if device.type == "cpu" else noise.pin_memory().to(device, non_blocking=True)


def timestep_to_device(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook of a UNet: writes the timestep on the device, where a copy from the host
    would wait for the steps so far."""
    sample, timestep, *rest = inputs
    timestep = torch.full((), timestep.item(), dtype=timestep.dtype, device=sample.device)
    return (sample, timestep, *rest), options
