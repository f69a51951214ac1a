"""Who is let in, whose turn it is, and what those are told who are not."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from sdxl_worker.serving.answering import Answer, Outcome
from sdxl_worker.serving.places import LONGEST_RETRY_AFTER_SECONDS, Full, Places
from sdxl_worker.serving.slot import begin_next_job

DONE = Answer({}, Outcome.DONE)


class Jobs:
    """Some that begin when it is their turn, and end when they are told to."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.begun: list[str] = []
        self.ended: list[str] = []
        self._may_leave: dict[str, asyncio.Event] = {}
        self._may_end: dict[str, asyncio.Event] = {}

    def start(self, name: str) -> "asyncio.Task[Answer]":
        self._may_leave[name], self._may_end[name] = asyncio.Event(), asyncio.Event()
        return asyncio.create_task(self._enter_and_run(name))

    async def _enter_and_run(self, name: str) -> Answer:
        with self.places.entered():
            return await self.places.run(lambda: self._work(name))

    async def _work(self, name: str) -> Answer:
        self.begun.append(name)
        try:
            await self._may_leave[name].wait()
            begin_next_job()
            await self._may_end[name].wait()
            return DONE
        finally:
            self.ended.append(name)

    async def leave(self, name: str) -> None:
        self._may_leave[name].set()
        await settled()

    async def end(self, name: str) -> None:
        await self.leave(name)
        self._may_end[name].set()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def in_loop(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_turns_come_in_order_and_the_next_one_when_a_job_has_left_the_gpu() -> None:
    async def check() -> None:
        jobs = Jobs(Places(2, 3))
        tasks = [jobs.start(name) for name in "abcde"]
        await settled()
        assert jobs.begun == ["a", "b"]
        assert (jobs.places.running, jobs.places.waiting, jobs.places.taken) == (2, 3, 5)
        await jobs.leave("b")
        assert jobs.begun == ["a", "b", "c"]
        assert jobs.ended == []
        for name in "abcde":
            await jobs.end(name)
        assert await asyncio.gather(*tasks) == [DONE] * 5
        assert jobs.begun == list("abcde")
        assert (jobs.places.running, jobs.places.waiting, jobs.places.taken) == (0, 0, 0)

    in_loop(check())


def test_one_more_than_there_are_places_is_not_let_in() -> None:
    async def check() -> None:
        jobs = Jobs(Places(1, 1))
        tasks = [jobs.start(name) for name in "ab"]
        await settled()
        with pytest.raises(Full):
            await jobs.start("c")
        await jobs.leave("a")
        with pytest.raises(Full):  # "a" is on its way to storage, and holds its pictures
            await jobs.start("c")
        await jobs.end("a")
        tasks.append(jobs.start("c"))
        for name in "bc":
            await jobs.end(name)
        await asyncio.gather(*tasks)

    in_loop(check())


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_job_that_is_cancelled_gives_up_its_place(name: str) -> None:
    async def check() -> None:
        jobs = Jobs(Places(1, 2))
        tasks = {one: jobs.start(one) for one in "abc"}
        await settled()
        tasks[name].cancel()
        await asyncio.wait([tasks[name]])
        assert tasks[name].cancelled()
        assert jobs.ended == (["a"] if name == "a" else []), "its work is over, if it had begun"
        await settled()
        assert (jobs.places.running, jobs.places.waiting, jobs.places.taken) == (1, 1, 2)
        for one in "abc".replace(name, ""):
            await jobs.end(one)
            assert await tasks[one] == DONE
        assert jobs.places.taken == 0

    in_loop(check())


def test_a_job_that_is_cancelled_on_its_way_to_storage_is_over() -> None:
    async def check() -> None:
        jobs = Jobs(Places(1, 1))
        task = jobs.start("a")
        await settled()
        await jobs.leave("a")
        task.cancel()
        await asyncio.wait([task])
        assert jobs.ended == ["a"]
        assert (jobs.places.running, jobs.places.taken) == (0, 0)

    in_loop(check())


def test_the_time_to_come_again_is_what_those_that_wait_will_take() -> None:
    async def check() -> None:
        jobs = Jobs(Places(2, 10))
        assert jobs.places.retry_after_seconds() == 5, "guessed: ten seconds for each job"
        jobs.places._recent.extend([1.0, 3.0])
        assert jobs.places.retry_after_seconds() == 1
        tasks = [jobs.start(name) for name in "abcdefg"]
        await settled()
        assert jobs.places.waiting == 5
        assert jobs.places.retry_after_seconds() == 6  # six jobs of two seconds, two at once
        jobs.places._recent.append(10_000)
        assert jobs.places.retry_after_seconds() == LONGEST_RETRY_AFTER_SECONDS
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    in_loop(check())


def test_a_job_that_is_sure_to_wait_too_long_is_not_let_in() -> None:
    """Though there is room: the quickest of the last jobs took a second."""

    async def check() -> None:
        for longest_wait_seconds in (2.5, None):
            jobs = Jobs(Places(1, 100, longest_wait_seconds))
            jobs.places._recent.extend([1.0, 50.0])
            tasks = [jobs.start(name) for name in "abcd"]
            await settled()
            assert jobs.places.waiting == 3
            if longest_wait_seconds is None:
                tasks.append(jobs.start("e"))
                await settled()
                assert jobs.places.waiting == 4
            else:
                with pytest.raises(Full):
                    await jobs.start("e")
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    in_loop(check())


def test_only_jobs_that_were_drawn_tell_what_one_takes() -> None:
    async def check() -> None:
        places = Places(1, 1)

        async def refused() -> Answer:
            return Answer({}, Outcome.REFUSED)

        async def drawn() -> Answer:
            return DONE

        await places.run(refused)
        assert list(places._recent) == []
        await places.run(drawn)
        assert len(places._recent) == 1

    in_loop(check())


def test_the_end_waits_for_all_that_are_there() -> None:
    async def check() -> None:
        jobs = Jobs(Places(1, 1))
        await jobs.places.until_empty()
        tasks = [jobs.start(name) for name in "ab"]
        await settled()
        ending = asyncio.create_task(jobs.places.until_empty())
        await jobs.end("a")
        assert not ending.done()
        await jobs.end("b")
        await ending
        await asyncio.gather(*tasks)

    in_loop(check())
