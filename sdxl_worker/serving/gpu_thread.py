"""The one thread that uses the GPU."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from sdxl_worker.errors import let_go

P = ParamSpec("P")
T = TypeVar("T")

# One job after the other: neither the networks nor the GPU's memory allow two at once, and the
# event loop stays free for pings, stop signals and results. The thread starts with its first call.
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")


async def on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on the GPU thread. Cancelled before its turn comes, it never runs."""
    return await asyncio.wrap_future(start_on_gpu_thread(function, *args, **kwargs))


def start_on_gpu_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """As `on_gpu_thread`, without waiting for it."""

    def run() -> T:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            # The error lives until it is reported and logged; other jobs need the memory earlier.
            let_go(error)
            raise

    return _thread.submit(run)
