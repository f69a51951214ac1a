"""The one thread that uses the GPU, and what can be told of the GPU's state."""

import asyncio
import collections
import resource
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

# One picture after the other: neither schedulers nor pipelines bear two at once, and the event
# loop stays free for pings, stop signals and results. The thread starts with its first call.
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")


async def on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on the GPU thread. Cancelled before its turn comes, it never runs."""
    return await asyncio.wrap_future(start_on_gpu_thread(function, *args, **kwargs))


def start_on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """As `on_gpu_thread`, without waiting for it."""
    return _thread.submit(function, *args, **kwargs)


class StepsAhead:
    """Keeps the host from queueing more than two steps of work on the GPU.

    Without it, all steps of a job may be queued before the first is done: progress would tell of
    steps to come, and a job that is stopped would hold the GPU until its end.
    """

    LIMIT = 2

    def __init__(self, device: "torch.device") -> None:
        self._cuda = device.type == "cuda"
        self._steps: collections.deque[Any] = collections.deque()

    def limit(self) -> None:
        """To be called after each step."""
        if not self._cuda:
            return
        import torch

        step = torch.cuda.Event()
        step.record()
        self._steps.append(step)
        if len(self._steps) > self.LIMIT:
            self._steps.popleft().synchronize()


def gpu_is_broken() -> bool:
    """Whether the process can no longer use its GPU, as after an illegal memory access.

    Such an error stays: every later call to the device raises it again, so asking tells.
    """
    torch = _torch_with_gpu()
    if torch is None:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def peak_memory_bytes() -> int:
    """The most that was in use: GPU memory since `reset_peak_memory`, or of the whole process."""
    torch = _torch_with_gpu()
    if torch is not None:
        from sdxl_worker import cuda_graphs

        return int(torch.cuda.max_memory_allocated()) + cuda_graphs.idle_bytes()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024


def reset_peak_memory() -> None:
    torch = _torch_with_gpu()
    if torch is not None:
        torch.cuda.reset_peak_memory_stats()


def _torch_with_gpu() -> Any:
    """torch, if it is imported already and uses a GPU. Asking must not cost seconds of import."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch
