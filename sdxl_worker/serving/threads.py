"""Work off the event loop, which stays free for stop signals and results."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from sdxl_worker.errors import let_go

P = ParamSpec("P")
T = TypeVar("T")

# The one thread that uses the GPU. One job after the other: neither the networks nor the GPU's
# memory allow two at once. The thread starts with its first call.
_gpu_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")


async def on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on the GPU thread. Cancelled before its turn comes, it never runs."""
    return await asyncio.wrap_future(start_on_gpu_thread(function, *args, **kwargs))


def start_on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """As `on_gpu_thread`, without waiting for it."""
    return _gpu_thread.submit(_answering, functools.partial(function, *args, **kwargs))


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function`, which takes a moment of CPU time and waits for nobody, in another thread."""
    return await asyncio.to_thread(_answering, functools.partial(function, *args, **kwargs))


def _answering(function: Callable[[], T]) -> T:
    """
    Raises:
        RuntimeError: for what is no `Exception`, and for StopIteration. A future cannot carry
            StopIteration to a coroutine, which would wait for ever, and whatever ends a program or
            a task would, on the way out of a job, end the worker or leave the job unanswered.
    """
    try:
        return function()
    except BaseException as error:
        # The error lives until it is reported and logged; other jobs need the memory earlier.
        let_go(error)
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise RuntimeError(f"{type(error).__name__} in a job") from error
