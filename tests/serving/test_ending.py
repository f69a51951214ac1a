"""What a job waits for does not hold the end of the worker."""

import asyncio
import time

import pytest

from sdxl_worker.errors import RequestError
from sdxl_worker.serving import ending
from sdxl_worker.serving.ending import hurry, not_holding_the_end


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "HURRIED_SECONDS", 0.2)
    monkeypatch.setattr(ending, "_ends_at", None)


async def wait(seconds: float) -> None:
    async with not_holding_the_end("the picture"):
        await asyncio.sleep(seconds)


def test_without_an_end_a_wait_takes_its_time() -> None:
    asyncio.run(wait(0.3))


def test_waits_that_are_under_way_and_that_come_later_end_soon() -> None:
    async def run() -> None:
        waits = [asyncio.create_task(wait(30))]
        await asyncio.sleep(0.01)
        hurry()
        waits.append(asyncio.create_task(wait(30)))
        began = time.monotonic()
        hurry()  # a second signal gives no more time
        for waiting in waits:
            with pytest.raises(RequestError, match="told to end before the picture was there"):
                await waiting
        assert time.monotonic() - began < 5
        with pytest.raises(RequestError):
            await wait(30)

    asyncio.run(run())


def test_what_comes_in_time_is_there() -> None:
    async def run() -> None:
        hurry()
        await wait(0.01)

    asyncio.run(run())


def test_a_wait_that_has_just_ended_stops_no_other() -> None:
    async def run() -> None:
        late = asyncio.create_task(wait(0.3))
        await asyncio.sleep(0.01)
        hurry()
        ending._ends_at = None
        with pytest.raises(RequestError):
            await late

        async def hurrying_as_it_expires() -> None:
            async with not_holding_the_end("the picture"):
                [own] = ending._waits
                own.reschedule(asyncio.get_running_loop().time())
                try:
                    await asyncio.sleep(1)
                finally:
                    hurry()

        with pytest.raises(RequestError):
            await hurrying_as_it_expires()

    asyncio.run(run())


def test_another_timeout_inside_is_its_own() -> None:
    async def run() -> None:
        async with not_holding_the_end("the picture"):
            raise TimeoutError

    with pytest.raises(TimeoutError):
        asyncio.run(run())
