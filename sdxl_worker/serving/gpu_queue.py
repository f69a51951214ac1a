"""The one thread that uses the GPU, and what waits for it."""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sdxl_worker.errors import let_go

log = logging.getLogger(__name__)

T = TypeVar("T")

# How many that came later may begin before one that waits: it waits inside the worker, where the
# platform counts the time as its execution.
MOST_PASSED_BY = 4
# The kind of what takes a moment only: it is done between the passes of whatever is drawn.
A_MOMENT = "a moment"


@dataclass
class _Waiting(Generic[T]):
    function: Callable[[], T]
    kind: Hashable | None
    at_most: int
    future: Future[T] = field(default_factory=Future)
    passed_by: int = 0
    """Those that came later and began before it."""

    def run(self) -> None:
        """Raises nothing."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class GpuQueue:
    """Work is done one after the other: neither the networks nor the GPU's memory allow two at
    once. But drawings of one kind are done side by side, and such that come later join them."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting[Any]] = deque()
        self._lock = threading.Lock()
        # It starts with its first call.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")

    def put(
        self, function: Callable[[], T], kind: Hashable | None = None, at_most: int = 1
    ) -> Future[T]:
        """
        Args:
            kind: drawings of one kind may be done side by side. None: this is done alone.
            at_most: how many side by side.
        """
        waiting = _Waiting(function, kind, at_most)
        with self._lock:
            self._waiting.append(waiting)
        self._thread.submit(self._serve)
        return waiting.future

    def _serve(self) -> None:
        """The first that waits, with those that may be done beside it. Called once for each that
        was put: there is none left where some were done together."""
        with self._lock:
            if not self._waiting:
                return
            first = [self._waiting.popleft()]
        if first[0].kind in (None, A_MOMENT):
            first[0].run()
        else:
            self._side_by_side(first)

    def _side_by_side(self, to_begin: list[_Waiting[Any]]) -> None:
        """
        Args:
            to_begin: one, which is taken out: the last may be done much later, and its answer must
                not be kept until then.
        """
        kind, at_most = to_begin[0].kind, to_begin[0].at_most

        def begin(drawn: int) -> Iterator[Callable[[], None]]:
            while (moment := self._next(A_MOMENT)) is not None:
                moment.run()
            while drawn < at_most:
                one = to_begin.pop() if to_begin else self._next(kind)
                if one is None:
                    return
                yield one.run
                drawn += 1

        try:
            from sdxl_worker.speed.shared_passes import draw_side_by_side  # imports torch

            draw_side_by_side(begin)
        except BaseException as error:
            log.exception("what is drawn side by side failed")
            # Those that stopped in their middle end with what greenlets raise then, once nothing
            # holds them: the error would.
            let_go(error)
            for one in to_begin:
                one.future.set_exception(error)

    def _next(self, kind: Hashable) -> _Waiting[Any] | None:
        """The next of this kind, unless one was passed by as often as it may be."""
        with self._lock:
            # One that is cancelled would hold up those behind it, once it was passed by often.
            self._waiting = deque(one for one in self._waiting if not one.future.cancelled())
            for i, one in enumerate(self._waiting):
                if one.kind == kind:
                    if kind != A_MOMENT:
                        for other in itertools.islice(self._waiting, i):
                            other.passed_by += 1
                    del self._waiting[i]
                    return one
                if one.passed_by >= MOST_PASSED_BY and kind != A_MOMENT:
                    return None
        return None
