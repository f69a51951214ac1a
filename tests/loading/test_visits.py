"""A network that comes to the device, here to another place on the host, and leaves it."""

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from sdxl_worker.loading import visits
from sdxl_worker.loading.visits import Visit

DEVICE = torch.device("cpu", 0)


def network() -> Any:
    made: Any = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    return made.to(memory_format=torch.channels_last)


def tensors(of: torch.nn.Module) -> list[torch.Tensor]:
    return [*of.parameters(), *of.buffers()]


def addresses(of: torch.nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors(of)]


def test_all_of_it_comes_as_a_copy_and_what_was_there_before_is_put_back() -> None:
    made = network()
    objects, home = tensors(made), addresses(made)
    before = [tensor.detach().clone() for tensor in objects]
    visit = Visit(made, DEVICE)
    assert all(one is other for one, other in zip(tensors(made), objects, strict=True))
    assert set(addresses(made)).isdisjoint(home)
    assert all(map(torch.equal, tensors(made), before))
    assert made[0].weight.is_contiguous(memory_format=torch.channels_last)
    visit.end()
    assert addresses(made) == home
    assert all(map(torch.equal, tensors(made), before))


def test_nothing_that_is_unchanged_is_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    visit = Visit(made, DEVICE)

    def to(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.Tensor, "to", to)
    visit.end()


def test_what_was_changed_meanwhile_is_copied_back_and_nothing_else() -> None:
    made = network()
    home = addresses(made)
    weight = made[0].weight
    visit = Visit(made, DEVICE)
    with torch.no_grad():
        weight.copy_(torch.full_like(weight, 2))  # as LoRAs are put on
    visit.end()
    assert torch.equal(weight, torch.full_like(weight, 2))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert addresses(made) == home, "what is pinned there stays so"
    again = Visit(made, DEVICE)
    assert torch.equal(weight, torch.full_like(weight, 2))
    again.end()


def test_one_that_changes_its_format_meanwhile_keeps_it() -> None:
    made = network()
    visit = Visit(made, DEVICE)
    made.double()
    visit.end()
    assert {tensor.dtype for tensor in made.parameters()} == {torch.float64}


def test_one_that_changes_its_format_at_the_same_address_keeps_it() -> None:
    """As on a GPU, where freed memory is given again at once."""
    made = network()
    visit = Visit(made, DEVICE)
    mean = made[1].running_mean
    mean.data = mean.data.view(torch.int32)
    visit.end()
    assert mean.dtype == torch.int32


def test_one_that_is_laid_out_otherwise_meanwhile_stays_so() -> None:
    made = network().to(memory_format=torch.contiguous_format)
    visit = Visit(made, DEVICE)
    made.to(memory_format=torch.channels_last)
    visit.end()
    assert made[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_one_that_cannot_go_back_can_once_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    home = addresses(made)
    visit = Visit(made, DEVICE)
    with torch.no_grad():
        made[0].weight.fill_(2)

    def to(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", to)
        with pytest.raises(RuntimeError, match="no memory"):
            visit.end()
    visit.end()
    assert addresses(made) == home
    assert torch.equal(made[0].weight, torch.full_like(made[0].weight, 2))


def test_one_that_does_not_fit_stays_where_it_was_wholly(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    home = addresses(made)
    to, calls = torch.Tensor.to, []

    def third_fails(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return to(tensor, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", third_fails)
        with pytest.raises(torch.OutOfMemoryError):
            Visit(made, DEVICE)
    assert addresses(made) == home
    Visit(made, DEVICE).end()


def test_what_is_copied_back_does_not_keep_the_device_s_memory() -> None:
    made = network()
    visit = Visit(made, DEVICE)
    with torch.no_grad():
        made[0].weight.fill_(1)
    there = weakref.ref(made[0].weight.untyped_storage())
    visit.end()
    gc.collect()
    assert there() is None


class TestPinning:
    """Only a machine with CUDA has pinned memory: what is seen here is what is asked for."""

    @pytest.fixture(autouse=True)
    def _as_with_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.network = network()
        self.pinned: list[torch.Tensor] = []
        self.fails = False

        def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise RuntimeError("no")
            self.pinned.append(tensor)
            return tensor

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
        to = torch.Tensor.to

        def to_host(tensor: torch.Tensor, _: torch.device, **options: Any) -> torch.Tensor:
            return to(tensor, DEVICE, **options)

        monkeypatch.setattr(torch.Tensor, "to", to_host)

    def comes(self) -> None:
        Visit(self.network, torch.device("cuda")).end()

    def test_all_is_pinned_where_there_is_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(visits, "free_host_bytes", lambda: 10**6)
        self.comes()
        assert len(self.pinned) == len(tensors(self.network))

    def test_nothing_where_it_might_take_the_host_s_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = sum(tensor.nbytes for tensor in tensors(self.network))
        monkeypatch.setattr(visits, "free_host_bytes", lambda: 2 * size - 1)
        self.comes()
        assert self.pinned == []

    def test_where_it_cannot_be_it_comes_all_the_same_and_the_log_says_so(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(visits, "free_host_bytes", lambda: 10**6)
        self.fails = True
        with caplog.at_level(logging.WARNING):
            self.comes()
        assert "cannot be pinned: no" in caplog.text
