"""A job's place in the worker, which the next job waits for."""

from collections.abc import Callable
from contextvars import ContextVar

# Of the task that runs the job's handler, and of those that it starts.
leave: ContextVar[Callable[[], None] | None] = ContextVar("leave", default=None)


def begin_next_job() -> None:
    """The job of this task is done with the GPU: the next one may begin beside the rest of it,
    which waits for others only. Where no scaler runs the job, nothing happens."""
    if (leave_slot := leave.get()) is not None:
        leave_slot()
