"""Faults on demand: what a test asks for happens to the next requests of a route, then no more.

Or at random, for long runs: some of the requests of some routes fail, until it is cleared.
"""

import random
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ROUTES = frozenset(
    {
        *("run", "runsync", "status", "stream", "cancel", "retry", "purge-queue", "health"),
        "openai",
        *("job-take", "job-take-batch", "job-stop", "job-done", "progress", "job-stream", "ping"),
    }
)
Kind = Literal["answer", "drop", "drop-answer", "delay", "duplicate"]
ERROR_BODY = '{"error": "a fault on demand"}'


@dataclass(frozen=True)
class Fault:
    """`Faults` has a method for each kind, which says what it does."""

    kind: Kind
    status_code: int = 500
    body: str = ERROR_BODY
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_seconds: float = 0


# Those that pass, where the request is sent again.
PASSING = (
    Fault("answer", 500),
    Fault("answer", 429, headers={"Retry-After": "1"}),
    Fault("drop"),
    Fault("drop-answer"),
    Fault("delay", delay_seconds=1),
)


def _answer_200(body: str, content_type: str = "application/json") -> Fault:
    return Fault("answer", 200, body, {"Content-Type": content_type})


# What job-take and job-take-batch might answer and should not.
JUNK_JOBS: Mapping[str, Fault] = {
    "a list of junk": _answer_200('[1, null, "job", [], {}]'),
    "no id": _answer_200('{"input": {"prompt": "a"}}'),
    "no input": _answer_200('{"id": "junk"}'),
    "an object as id": _answer_200('{"id": {"a": 1}, "input": {"prompt": "a"}}'),
    "a number as id": _answer_200('{"id": 7, "input": {"prompt": "a"}}'),
    "null as id": _answer_200('{"id": null, "input": {"prompt": "a"}}'),
    "an empty id": _answer_200('{"id": "", "input": {"prompt": "a"}}'),
    "a newline in the id": _answer_200(r'{"id": "a\nb", "input": {"prompt": "a"}}'),
    "a path as id": _answer_200('{"id": "../../x", "input": {"prompt": "a"}}'),
    "two dots as id": _answer_200('{"id": "..", "input": {"prompt": "a"}}'),
    "a lone surrogate in the id": _answer_200(r'{"id": "\ud800", "input": {"prompt": "a"}}'),
    "more keys than the SDK knows": _answer_200('{"id": "junk", "input": 1, "self": 1, "id2": 2}'),
    "null": _answer_200("null"),
    "a number": _answer_200("7"),
    "a string": _answer_200('"job"'),
    "nothing": _answer_200(""),
    "no JSON": _answer_200('{"id": "junk", '),
    "another content type": _answer_200('{"id": "junk", "input": 1}', "text/html"),
}


class Faults:
    """Thread-safe. Faults of a route happen in the order in which they were asked for.

    A route is named as in the URL ("job-done"); "progress" is a job-done request that carries
    progress, and "job-done" is any other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[tuple[str, Fault]] = []
        self._random_routes: Collection[str] = ()
        self._random_faults: Sequence[Fault] = ()
        self._share = 0.0
        self._random = random.Random()  # noqa: S311  no secret

    def answer(
        self,
        route: str,
        status_code: int = 500,
        *,
        body: str = ERROR_BODY,
        headers: Mapping[str, str] | None = None,
        times: int = 1,
    ) -> None:
        """Answer with this and do nothing else. It is JSON if `headers` do not say otherwise."""
        self.add(route, Fault("answer", status_code, body, headers or {}), times=times)

    def drop(self, route: str, *, times: int = 1) -> None:
        """Close the connection without looking at the request."""
        self.add(route, Fault("drop"), times=times)

    def drop_answer(self, route: str, *, times: int = 1) -> None:
        """Do what was asked, then close the connection instead of answering."""
        self.add(route, Fault("drop-answer"), times=times)

    def delay(self, route: str, delay_seconds: float, *, times: int = 1) -> None:
        """Wait before looking at the request."""
        self.add(route, Fault("delay", delay_seconds=delay_seconds), times=times)

    def duplicate(self, *, times: int = 1) -> None:
        """Hand out each of the next jobs twice: to the worker that takes it and to the next one."""
        self.add("job-take", Fault("duplicate"), times=times)

    def add(self, route: str, fault: Fault, *, times: int = 1) -> None:
        """What the methods above do; also for one of `JUNK_JOBS`."""
        _check(route)
        with self._lock:
            self._pending += [(route, fault)] * times

    def at_random(
        self,
        *routes: str,
        faults: Sequence[Fault] = PASSING,
        share: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Let this share of the requests of these routes meet one of the faults, until `clear`.

        The same requests in the same order meet the same faults. `Record.exchanges` has each.
        """
        for route in routes:
            _check(route)
        with self._lock:
            self._random_routes, self._random_faults, self._share = routes, faults, share
            self._random.seed(seed)

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()
            self._share = 0

    @property
    def pending(self) -> list[tuple[str, Fault]]:
        """What was asked for and has not happened yet: routes and faults."""
        with self._lock:
            return list(self._pending)

    def next(self, route: str) -> Fault | None:
        """The next fault of this route, if there is one; it happens once."""
        with self._lock:
            return self._take(route, is_duplicate=False) or self._draw(route)

    def next_duplicate(self) -> bool:
        """Whether the job that is handed out now has to be handed out twice."""
        with self._lock:
            return self._take("job-take", is_duplicate=True) is not None

    def _take(self, route: str, *, is_duplicate: bool) -> Fault | None:
        for i, (pending_route, fault) in enumerate(self._pending):
            if pending_route == route and (fault.kind == "duplicate") == is_duplicate:
                del self._pending[i]
                return fault
        return None

    def _draw(self, route: str) -> Fault | None:
        if route not in self._random_routes or self._random.random() >= self._share:
            return None
        fault = self._random.choice(self._random_faults)
        if fault.kind == "duplicate":  # of the job that is handed out next
            self._pending.append(("job-take", fault))
            return None
        return fault


def _check(route: str) -> None:
    if route not in ROUTES:
        raise ValueError(f"no route {route!r}; there are {', '.join(sorted(ROUTES))}")
