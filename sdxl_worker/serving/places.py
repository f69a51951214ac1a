"""Who is let in where the worker serves HTTP: so many jobs are worked at, so many wait, and the
next one is told when to come again."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from sdxl_worker.serving import slot
from sdxl_worker.serving.answering import Answer, Outcome

# Of jobs that were drawn: what they took is the best guess at what the next ones will.
REMEMBERED_JOBS = 20
# Where none was drawn yet.
GUESSED_SECONDS = 10.0
LONGEST_RETRY_AFTER_SECONDS = 300


class Full(Exception):  # noqa: N818 - not an error: the worker is busy
    """There is no place for another job."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds


class Places:
    """Jobs from when they are let in until they are answered, in one event loop."""

    def __init__(
        self, at_once: int, queue_limit: int, longest_wait_seconds: float | None = None
    ) -> None:
        """
        Args:
            at_once: jobs that are worked at.
            queue_limit: jobs that may be there beside them.
            longest_wait_seconds: a job that is sure to wait for longer is not let in.
        """
        self._at_once = at_once
        self._limit = at_once + queue_limit
        self._longest_wait_seconds = longest_wait_seconds
        self._turns = asyncio.Semaphore(at_once)
        self._recent: deque[float] = deque(maxlen=REMEMBERED_JOBS)
        self._left = asyncio.Event()
        self.taken = 0
        """Jobs that are there at all: their bodies are read, they wait, run, or are uploaded."""
        self.waiting = 0
        self.running = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """
        Raises:
            Full: nothing is done.
        """
        if self.taken >= self._limit or self._waits_too_long():
            raise Full(self.retry_after_seconds())
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._left.set()

    async def run(self, work: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """Do the work when its turn comes; the next job's turn is when this one leaves its slot.
        Cancelled, the work is cancelled, and over when this returns."""
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        began = time.monotonic()
        left = asyncio.Event()
        token = slot.left.set(left)
        task = asyncio.create_task(work())
        slot.left.reset(token)
        task.add_done_callback(lambda _: left.set())
        try:
            await left.wait()
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        finally:
            seconds = time.monotonic() - began
            self.running -= 1
            self._turns.release()
        answer = await task
        if answer.outcome is Outcome.DONE:
            self._recent.append(seconds)
        return answer

    async def until_empty(self) -> None:
        while self.taken:
            self._left.clear()
            await self._left.wait()

    def retry_after_seconds(self) -> int:
        """When all that wait now should have begun."""
        average = sum(self._recent) / len(self._recent) if self._recent else GUESSED_SECONDS
        seconds = math.ceil(average * (self.waiting + 1) / self._at_once)
        return max(1, min(seconds, LONGEST_RETRY_AFTER_SECONDS))

    def _waits_too_long(self) -> bool:
        """Even if all jobs were as quick as the quickest one was."""
        if self._longest_wait_seconds is None or not self._recent:
            return False
        rounds = self.waiting // self._at_once
        return rounds * min(self._recent) > self._longest_wait_seconds
