"""What may wait for others must not hold the end of the worker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from sdxl_worker.errors import ToldToEndError

# What is left of such a wait when the worker is told to end.
HURRIED_SECONDS = 5.0

_waits: set[asyncio.Timeout] = set()
_ends_at: float | None = None


@contextlib.asynccontextmanager
async def not_holding_the_end(what: str) -> AsyncIterator[None]:
    """Around a wait for another machine, or for what a stranger's file makes of a decoder.

    Args:
        what: is waited for, in the error's words.

    Raises:
        ToldToEndError: the worker was told to end, and this did not come in time.
    """
    wait = asyncio.timeout_at(_ends_at)
    try:
        async with wait:
            _waits.add(wait)
            yield
    except TimeoutError:
        if not wait.expired():
            raise
        raise ToldToEndError(
            f"the worker was told to end before {what} was there; send the job again"
        ) from None
    finally:
        _waits.discard(wait)


def hurry() -> None:
    """All such waits, also those to come, end in `HURRIED_SECONDS`. Call it in the event loop."""
    global _ends_at
    if _ends_at is None:
        _ends_at = asyncio.get_running_loop().time() + HURRIED_SECONDS
        for wait in _waits:
            if not wait.expired():
                wait.reschedule(_ends_at)
