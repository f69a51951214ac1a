"""What waits for the GPU: in order, but for drawings of one kind, which nobody is held back for."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from weakref import ref

import pytest
from greenlet import getcurrent

from sdxl_worker.serving.gpu_queue import A_MOMENT, MOST_PASSED_BY, GpuQueue
from sdxl_worker.speed import shared_passes

SECONDS = 30


class FakePass:
    """A pass of a UNet in whose place nothing is done."""

    kind = "any"
    unet = None
    most_rows = None
    count = 1


def stop_at_a_pass() -> None:
    getcurrent().parent.switch(FakePass())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each pass, the drawings that share it."""
    done: list[int] = []

    def run(some: list[Any]) -> list[Any]:
        done.append(len(some))
        return [None] * len(some)

    monkeypatch.setattr(shared_passes, "_run", run)
    return done


class Held:
    """A queue whose thread waits until all is put, so that the order is certain."""

    def __init__(self) -> None:
        self.queue = GpuQueue()
        self.order: list[str] = []
        self._go = threading.Event()
        self._futures: list[Future[Any]] = [self.queue.put(self._wait)]

    def _wait(self) -> None:
        assert self._go.wait(SECONDS)

    def put(
        self, name: str, kind: Any = None, *, at_most: int = 4, steps: int = 2, **then: Any
    ) -> Future[Any]:
        """A drawing of so many steps; `then`: what is done at its first one."""

        def draw() -> str:
            self.order.append(name)
            for step in range(steps if kind not in (None, A_MOMENT) else 0):
                stop_at_a_pass()
                if step == 0 and "do" in then:
                    then["do"]()
            self.order.append(f"{name} done")
            return name

        future = self.queue.put(draw, kind, at_most)
        self._futures.append(future)
        return future

    def finish(self) -> list[str]:
        self._go.set()
        for future in self._futures:
            if not future.cancelled():
                future.result(SECONDS)
        return self.order


def begun(order: list[str]) -> list[str]:
    return [name for name in order if not name.endswith("done")]


@pytest.mark.usefixtures("passes")
def test_what_is_of_no_kind_is_done_alone_and_in_order() -> None:
    held = Held()
    for name in "abc":
        held.put(name)
    assert held.finish() == ["a", "a done", "b", "b done", "c", "c done"]


def test_drawings_of_one_kind_are_done_side_by_side(passes: list[int]) -> None:
    held = Held()
    for name in "abc":
        held.put(name, "kind")
    assert held.finish() == ["a", "b", "c", "a done", "b done", "c done"]
    assert passes == [3, 3]


def test_no_more_than_so_many_at_once(passes: list[int]) -> None:
    held = Held()
    for name in "abc":
        held.put(name, "kind", at_most=2)
    assert begun(held.finish()) == ["a", "b", "c"]
    assert passes == [2, 2, 1, 1]


def test_a_place_that_becomes_free_is_taken_at_the_next_pass(passes: list[int]) -> None:
    held = Held()
    held.put("a", "kind", at_most=2, steps=1)
    held.put("b", "kind", at_most=2, steps=4)
    held.put("c", "kind", at_most=2, steps=2)
    held.finish()
    assert passes == [2, 2, 2, 1]


def test_one_that_comes_while_others_are_drawn_joins_them(passes: list[int]) -> None:
    held = Held()
    held.put("a", "kind", steps=3, do=lambda: held.put("b", "kind"))
    order = held.finish()
    held.finish()
    assert order[:2] == ["a", "b"]
    assert passes == [1, 2, 2]


@pytest.mark.usefixtures("passes")
def test_of_another_kind_they_wait_for_their_turn() -> None:
    held = Held()
    for name, kind in (("a", "one"), ("b", "other"), ("c", "one"), ("d", "other")):
        held.put(name, kind)
    order = held.finish()
    assert begun(order) == ["a", "c", "b", "d"]
    assert order.index("c done") < order.index("b")


def test_nobody_is_passed_by_for_ever(passes: list[int]) -> None:
    """However many come that would fit."""
    held = Held()
    count = 0

    def another() -> None:
        nonlocal count
        count += 1
        if count < 3 * MOST_PASSED_BY:
            held.put(f"more {count}", "busy", do=another)

    held.put("first", "busy", do=another)
    patient = held.put("patient", "patient")
    held.finish()
    patient.result(SECONDS)
    before = begun(held.order)[: begun(held.order).index("patient")]
    assert before == ["first", *(f"more {i + 1}" for i in range(MOST_PASSED_BY))]
    while len(begun(held.order)) < 3 * MOST_PASSED_BY + 1:
        held.finish()
    assert passes


@pytest.mark.usefixtures("passes")
def test_what_takes_a_moment_is_done_between_two_passes() -> None:
    """Though all places are taken, and others wait before it."""
    held = Held()
    held.put("a", "kind", at_most=1, steps=3)
    held.put("alone")
    held.put("moment", A_MOMENT)
    order = held.finish()
    assert order.index("moment done") < order.index("a done")
    assert order.index("a done") < order.index("alone")


@pytest.mark.usefixtures("passes")
def test_a_moment_waits_for_nobody_who_was_passed_by() -> None:
    held = Held()
    many = {"at_most": MOST_PASSED_BY + 1, "steps": 3}
    held.put("a", "kind", do=lambda: held.put("moment", A_MOMENT), **many)
    held.put("other", "other")
    for _ in range(MOST_PASSED_BY):
        held.put("b", "kind", **many)
    order = held.finish()
    assert order.index("moment") < order.index("a done")


@pytest.mark.usefixtures("passes")
def test_moments_do_not_count_as_passing_by() -> None:
    held = Held()
    held.put("a", "kind")
    held.put("other", "other")
    for _ in range(MOST_PASSED_BY + 1):
        held.put("moment", A_MOMENT)
    held.put("b", "kind")
    order = held.finish()
    assert order.index("b") < order.index("other")


@pytest.mark.usefixtures("passes")
def test_what_is_cancelled_while_it_waits_never_runs() -> None:
    held = Held()
    held.put("a", "kind")
    cancelled = [held.put("b", "kind"), held.put("c"), held.put("d", A_MOMENT)]
    assert all(one.cancel() for one in cancelled)
    held.put("last")
    assert held.finish() == ["a", "a done", "last", "last done"]


def test_nor_does_it_where_nothing_is_drawn() -> None:
    held = Held()
    assert held.put("a").cancel()
    held.put("last")
    assert held.finish() == ["last", "last done"]


@pytest.mark.usefixtures("passes")
def test_a_failure_is_one_drawing_s_own() -> None:
    held = Held()

    def fail() -> None:
        raise ValueError("a")

    failing = held.put("a", "kind", do=fail)
    other = held.put("b", "kind")
    with pytest.raises(ValueError, match="a"):
        held.finish()
    assert isinstance(failing.exception(SECONDS), ValueError)
    assert other.result(SECONDS) == "b"


def test_it_goes_on_after_a_pass_that_nothing_catches(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Callable[[int], Iterator[Any]]) -> None:
        raise SystemError("broken")

    queue = GpuQueue()
    monkeypatch.setattr(shared_passes, "draw_side_by_side", broken)
    lost = queue.put(lambda: 1, "kind")
    assert queue.put(lambda: 2).result(SECONDS) == 2
    assert isinstance(lost.exception(SECONDS), SystemError)


@pytest.mark.usefixtures("passes")
def test_those_in_their_middle_are_answered_when_what_draws_them_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: list[Any], __: dict[Any, int]) -> None:
        raise SystemError("broken")

    monkeypatch.setattr(shared_passes, "_outcomes", broken)
    held = Held()
    lost = [held.put(name, "kind") for name in "abc"]
    with pytest.raises(BaseException, match="greenlet"):
        held.finish()
    assert all(one.exception(SECONDS) is not None for one in lost)


def test_one_that_is_cancelled_holds_up_nobody(passes: list[int]) -> None:
    """Though it was passed by as often as one may be."""
    held = Held()
    count = 0

    def another() -> None:
        nonlocal count
        count += 1
        if count <= MOST_PASSED_BY:
            held.put(f"more {count}", "busy", do=another)
        else:
            impatient.cancel()
            held.put("last", "busy")

    held.put("first", "busy", do=another)
    impatient = held.put("impatient", "other")
    while "last done" not in held.order:
        held.finish()
    assert held.order.index("last") < held.order.index(f"more {MOST_PASSED_BY} done")
    assert "impatient" not in held.order
    assert passes


@pytest.mark.usefixtures("passes")
def test_an_answer_is_not_kept_until_all_are_done() -> None:
    class Answer:
        pass

    held = Held()
    kept: list[bool] = []
    answers: list[ref[Answer]] = []

    def draw() -> Answer:
        stop_at_a_pass()
        answers.append(ref(answer := Answer()))
        return answer

    def note() -> None:
        stop_at_a_pass()
        kept.append(answers[0]() is not None)

    held.queue.put(draw, "kind", 4)
    held.put("long", "kind", do=note)
    held.finish()
    assert kept == [False]
