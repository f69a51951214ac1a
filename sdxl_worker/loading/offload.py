"""For a card that is too small for all networks: one on the GPU at a time, the others on the host.

diffusers' own offloading belongs to a pipeline and is a chain: each network sends away the one
before it, and copies its weights back. Here pipelines come and go, and share networks; so there is
one seat for all, and what leaves it was on the host all the time.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device

from sdxl_worker.loading.visits import Visit


def take_turns(networks: Collection[torch.nn.Module], device: torch.device) -> None:
    """From now on, each of `networks` comes to `device` for its pass, and the others leave it.

    Called again with more networks, it holds for all of them.
    """
    end_turns(networks)
    seat = _Seat(device)
    for network in networks:
        add_hook_to_module(network, _Turn(seat))


def end_turns(networks: Iterable[torch.nn.Module]) -> None:
    """None of those that take turns is on the device, until its turn comes again."""
    for network in networks:
        hook = getattr(network, "_hf_hook", None)
        if isinstance(hook, _Turn):
            hook.seat.leave()


def send_home(networks: Collection[torch.nn.Module]) -> None:
    """All of them leave the device, whether they take turns or not."""
    end_turns(networks)
    for network in networks:
        network.to("cpu")


class _Seat:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._network: torch.nn.Module | None = None
        self._visit: Visit | None = None

    def take(self, network: torch.nn.Module) -> None:
        # Asking a network where it is takes milliseconds, in each step.
        if self._network is not network:
            self.leave()
            self._visit = Visit(network, self.device)
            self._network = network

    def leave(self) -> None:
        self._network = None  # nobody's, also where this fails
        if self._visit is not None:
            self._visit.end()
        self._visit = None


class _Turn(ModelHook):
    def __init__(self, seat: _Seat) -> None:
        self.seat = seat
        self.execution_device = seat.device  # where pipelines make the network's inputs

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.seat.take(module)
        return tuple(send_to_device(inputs, self.execution_device) for inputs in (args, kwargs))
