"""A job's place in the worker, which the next job waits for."""

import asyncio
from contextvars import ContextVar

# Of the task that runs the job's handler, and of those that it starts: set once the job left.
left: ContextVar[asyncio.Event | None] = ContextVar("left", default=None)


def begin_next_job() -> None:
    """The job of this task is done with the GPU: the next one may begin beside the rest of it.
    Where no scaler runs the job, nothing happens."""
    if (event := left.get()) is not None:
        event.set()


def next_job_has_begun() -> bool:
    """Whether the job of this task would have to wait for another one's drawing."""
    event = left.get()
    return event is not None and event.is_set()
