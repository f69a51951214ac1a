"""Which models stay in memory, and where. What memory there is, is told by stand-ins."""

import functools
import random
from collections.abc import Collection

import pytest

from sdxl_worker.serving.models_kept import ModelsKept


class Machine:
    """With room for so many bytes on its card and on its host; models are their own names."""

    def __init__(self, card: int, host: int, **sizes: int) -> None:
        self.room = {"card": card, "host": host}
        self.sizes = sizes
        self.places: dict[str, str] = {}
        self.done: list[str] = []
        self.kept: ModelsKept[str, str] = ModelsKept(self)

    def bring(self, name: str, beside: Collection[str] = ()) -> list[str]:
        """What had to be done for it.

        Args:
            beside: the names of those that stay.
        """
        self.done = []
        load = functools.partial(self.load, name)
        assert self.kept.bring(name, self.sizes[name], load, beside) == name
        assert self.places[name] == "card"
        for place, room in self.room.items():
            alone = place == "card" and self.on(place) == [name]
            assert alone or self.used(place) <= room
        return self.done

    def load(self, name: str) -> str:
        self._put("load", name, "card")
        return name

    def on(self, place: str) -> list[str]:
        return [name for name, where in self.places.items() if where == place]

    def used(self, place: str) -> int:
        return sum(self.sizes[name] for name in self.on(place))

    def fits_card(self, size_bytes: int) -> bool:
        return self.used("card") + size_bytes <= self.room["card"]

    def fits_host(self, size_bytes: int) -> bool:
        return self.used("host") + size_bytes <= self.room["host"]

    def to_card(self, models: str) -> None:
        self._put("to card", models, "card")

    def to_host(self, models: str) -> None:
        self._put("to host", models, "host")

    def drop(self, models: str) -> None:
        self.done.append(f"drop {models}")
        del self.places[models]

    def _put(self, what: str, name: str, place: str) -> None:
        self.done.append(f"{what} {name}")
        self.places[name] = place


def test_what_is_on_the_card_costs_nothing() -> None:
    machine = Machine(20, 0, a=10, b=10)
    assert machine.bring("a") == ["load a"]
    assert machine.bring("b") == ["load b"]
    assert machine.bring("a") == machine.bring("b") == []


def test_the_one_that_was_used_least_recently_goes_first() -> None:
    machine = Machine(20, 10, a=10, b=10, c=10, d=10)
    machine.bring("a")
    machine.bring("b")
    machine.bring("a")
    assert machine.bring("c") == ["to host b", "load c"]
    assert machine.bring("d") == ["drop b", "to host a", "load d"]


def test_a_model_comes_back_from_the_host() -> None:
    machine = Machine(10, 20, a=10, b=10)
    machine.bring("a")
    machine.bring("b")
    assert machine.bring("a") == ["to host b", "to card a"]
    assert machine.bring("b") == ["to host a", "to card b"]


def test_two_models_change_places_only_where_the_host_holds_both_for_a_moment() -> None:
    machine = Machine(10, 19, a=10, b=10)
    machine.bring("a")
    machine.bring("b")
    assert machine.bring("a") == ["drop b", "to card a"]


def test_without_room_on_the_host_models_are_dropped() -> None:
    machine = Machine(10, 5, a=10, b=10)
    machine.bring("a")
    assert machine.bring("b") == ["drop a", "load b"]
    assert machine.kept.get("a") is None


def test_nothing_on_the_host_goes_for_what_would_not_fit_there_anyway() -> None:
    machine = Machine(20, 10, small=5, large=20, other=20)
    machine.bring("small")
    machine.bring("large")
    assert machine.places["small"] == "host"
    assert machine.bring("other") == ["drop large", "load other"]
    assert machine.places["small"] == "host"


def test_as_many_go_as_a_large_one_needs() -> None:
    machine = Machine(20, 20, a=5, b=5, c=5, d=5, large=12)
    for name in "abcd":
        machine.bring(name)
    assert machine.bring("large") == ["to host a", "to host b", "to host c", "load large"]


def test_a_model_that_never_fits_has_the_card_for_itself() -> None:
    machine = Machine(10, 100, a=5, huge=50)
    machine.bring("a")
    assert machine.bring("huge") == ["to host a", "load huge"]
    assert machine.bring("a") == ["to host huge", "to card a"]


def test_a_model_that_cannot_be_loaded_leaves_the_others() -> None:
    machine = Machine(10, 10, a=10, b=10)
    machine.bring("a")

    def fail() -> str:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        machine.kept.bring("b", 10, fail)
    assert machine.kept.get("b") is None
    assert machine.bring("a") == ["to card a"]


def test_a_model_that_is_lost_on_its_way_to_the_card_is_loaded_again() -> None:
    machine = Machine(10, 20, a=10, b=10)
    machine.bring("a")
    machine.bring("b")

    def fail(models: str) -> None:  # noqa: ARG001
        raise RuntimeError("out of memory")

    machine.to_card = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        machine.kept.bring("a", 10, lambda: "a")
    assert machine.kept.get("a") is None
    assert machine.bring("a") == ["load a"]
    assert machine.kept.get("b") == "b"


def test_at_random_no_place_is_ever_too_full_and_none_is_lost() -> None:
    choose = random.Random(0)  # noqa: S311
    sizes = {name: choose.randint(1, 12) for name in "abcdefg"}
    machine = Machine(20, 15, **sizes)
    for _ in range(1000):
        machine.bring(choose.choice("abcdefg"))
        assert {name for name in sizes if machine.kept.get(name)} == set(machine.places)


def test_what_is_drawn_with_stays_beside_what_comes_for_it() -> None:
    """The model was used least recently, and its ControlNets are on their way to the card."""
    machine = Machine(20, 10, model=10, other=5, control=5, union=5)
    for name in ("model", "other", "control"):
        machine.bring(name)
    assert machine.bring("union", beside=["model", "union"]) == ["to host other", "load union"]
    assert machine.bring("control", beside=["model", "union", "control"]) == []
    assert machine.bring("other", beside=["model", "other"]) == ["to host union", "to card other"]


def test_what_waits_on_the_host_for_the_same_job_is_not_dropped() -> None:
    machine = Machine(20, 10, model=10, control=5, old=5, other=5, union=10)
    for name in ("model", "control", "old"):
        machine.bring(name)
    machine.bring("other", beside=["model", "old"])
    assert machine.places["control"] == "host"
    beside = ["model", "union", "control"]
    assert machine.bring("union", beside=beside) == [
        *("to host old", "drop old", "to host other"),
        "load union",
    ]
    assert machine.places["control"] == "host"


def test_what_does_not_fit_beside_is_tried_all_the_same() -> None:
    machine = Machine(20, 10, model=18, control=2)
    machine.bring("model")
    assert machine.bring("control", beside=["model", "control"]) == ["load control"]


def test_what_is_forgotten_is_not_touched() -> None:
    machine = Machine(20, 0, a=10)
    machine.bring("a")
    machine.kept.forget()
    assert machine.kept.get("a") is None
    assert machine.places == {"a": "card"}
