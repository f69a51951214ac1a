"""Faults on demand: what a test asks for happens to the next requests of a route, then no more."""

import threading
from dataclasses import dataclass
from typing import Literal

ROUTES = frozenset(
    {
        *("run", "runsync", "status", "stream", "cancel", "retry", "purge-queue", "health"),
        *("job-take", "job-take-batch", "job-stop", "job-done", "progress", "job-stream", "ping"),
    }
)
Kind = Literal["status", "drop", "drop-answer", "delay", "duplicate"]


@dataclass(frozen=True)
class Fault:
    kind: Kind
    status_code: int = 500
    delay_seconds: float = 0


class Faults:
    """Thread-safe. Faults of a route happen in the order in which they were asked for.

    A route is named as in the URL ("job-done"); "progress" is a job-done request that carries
    progress, and "job-done" is any other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[tuple[str, Fault]] = []

    def answer(self, route: str, status_code: int = 500, *, times: int = 1) -> None:
        """Answer with this status and do nothing else."""
        self._add(route, Fault("status", status_code=status_code), times)

    def drop(self, route: str, *, times: int = 1) -> None:
        """Close the connection without looking at the request."""
        self._add(route, Fault("drop"), times)

    def drop_answer(self, route: str, *, times: int = 1) -> None:
        """Do what was asked, then close the connection instead of answering."""
        self._add(route, Fault("drop-answer"), times)

    def delay(self, route: str, delay_seconds: float, *, times: int = 1) -> None:
        """Wait before looking at the request."""
        self._add(route, Fault("delay", delay_seconds=delay_seconds), times)

    def duplicate(self, *, times: int = 1) -> None:
        """Hand out each of the next jobs twice: to the worker that takes it and to the next one."""
        self._add("job-take", Fault("duplicate"), times)

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()

    @property
    def pending(self) -> list[tuple[str, Fault]]:
        """What was asked for and has not happened yet: routes and faults."""
        with self._lock:
            return list(self._pending)

    def next(self, route: str) -> Fault | None:
        """Take out the next fault of this route, if there is one."""
        return self._take(route, is_duplicate=False)

    def next_duplicate(self) -> bool:
        """Whether the job that is handed out now has to be handed out twice."""
        return self._take("job-take", is_duplicate=True) is not None

    def _add(self, route: str, fault: Fault, times: int) -> None:
        if route not in ROUTES:
            raise ValueError(f"no route {route!r}; there are {', '.join(sorted(ROUTES))}")
        with self._lock:
            self._pending += [(route, fault)] * times

    def _take(self, route: str, *, is_duplicate: bool) -> Fault | None:
        with self._lock:
            for i, (pending_route, fault) in enumerate(self._pending):
                if pending_route == route and (fault.kind == "duplicate") == is_duplicate:
                    del self._pending[i]
                    return fault
        return None
