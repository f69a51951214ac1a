"""What keeps the host from waiting for the GPU within a picture.

The host queues work faster than the GPU does it. Whatever reads a number from the GPU, or copies
one to it from ordinary memory, makes the host wait for all work so far, and the GPU then waits for
more. So schedules stay on the host, and what has to cross is written or copied without a wait.
"""

import collections
import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


def keep_tables_on_host(scheduler: SchedulerMixin) -> None:
    """Otherwise the pipelines put a schedule's tables, which each step reads, on the GPU."""
    set_timesteps = scheduler.set_timesteps

    # With the signature of the real one: the pipelines read from it what the scheduler takes.
    @functools.wraps(set_timesteps)
    def on_host(*args: Any, **options: Any) -> Any:
        return set_timesteps(*args, **{**options, "device": "cpu"})

    scheduler.set_timesteps = on_host


@contextlib.contextmanager
def timesteps_on_device(*unets: Any) -> Iterator[None]:
    """Around passes of UNets: timesteps, which come from the host, are written on the device."""
    with contextlib.ExitStack() as undo:
        for unet in unets:
            hook = unet.register_forward_pre_hook(_timestep_to_device, with_kwargs=True)
            undo.callback(hook.remove)
        yield


def _timestep_to_device(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    sample, timestep, *rest = inputs
    timestep = torch.full((), timestep.item(), dtype=timestep.dtype, device=sample.device)
    return (sample, timestep, *rest), options


def host_noise(
    shape: Sequence[int],
    generator: list[torch.Generator],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Noise as diffusers' `randn_tensor` draws it with generators of the host, but copied without a
    wait: only a copy from pinned memory is queued."""
    noise = randn_tensor(tuple(shape), generator, torch.device("cpu"), dtype)
    return noise if device.type == "cpu" else noise.pin_memory().to(device, non_blocking=True)


class StepsAhead:
    """Keeps the host from queueing more than two steps of work on the GPU.

    Without it, all steps of a job may be queued before the first is done: progress would report
    steps to come, and a job that is stopped would hold the GPU until its end.
    """

    LIMIT = 2

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: collections.deque[Any] = collections.deque()

    def limit(self) -> None:
        """Call it after each step."""
        if not self._cuda:
            return
        step = torch.cuda.Event()
        step.record()
        self._steps.append(step)
        if len(self._steps) > self.LIMIT:
            self._steps.popleft().synchronize()
