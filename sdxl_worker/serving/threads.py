"""Work off the event loop, which stays free for stop signals and results."""

import asyncio
import functools
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from sdxl_worker.errors import let_go
from sdxl_worker.serving.gpu_queue import GpuQueue

P = ParamSpec("P")
T = TypeVar("T")

_gpu_queue = GpuQueue()


async def on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function`, which takes a moment, on the GPU thread: between two passes of whatever is
    drawn. Cancelled before its turn comes, it never runs."""
    work = functools.partial(_answering, functools.partial(function, *args, **kwargs))
    return await asyncio.wrap_future(_gpu_queue.put_between(work))


async def draw_on_gpu_thread(function: Callable[[], T], kind: Hashable | None, at_most: int) -> T:
    """Run `function` on the GPU thread, alone or side by side, as `GpuQueue.put`."""
    return await asyncio.wrap_future(
        _gpu_queue.put(functools.partial(_answering, function), kind, at_most)
    )


def start_on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Run `function` on the GPU thread, alone, without waiting for it."""
    work = functools.partial(_answering, functools.partial(function, *args, **kwargs))
    return _gpu_queue.put(work)


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
