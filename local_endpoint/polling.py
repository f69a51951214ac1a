"""Waiting for the queue to change, which all held requests do."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Changes:
    """Wakes up everybody who waits, at each change. For one event loop, not thread-safe."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def notify(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def wait_for(self, look: Callable[[], T], seconds: float) -> T:
        """Call `look` at once and after each change, until it finds something or time is up.

        Returns:
            What `look` found, or what it returned last.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            # Nothing is awaited between looking and waiting: no change can be missed.
            found = look()
            remaining = deadline - loop.time()
            if found or remaining <= 0:
                return found
            try:
                async with asyncio.timeout(remaining):
                    await self._next.wait()
            except TimeoutError:
                return look()
