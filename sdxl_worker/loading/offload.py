"""For a card that is too small for all networks: one on the GPU at a time, the others on the host.

diffusers' own offloading belongs to a pipeline and is a chain: each network sends away the one
before it. Here pipelines come and go, and share networks; so each network sends away all others.
"""

from collections.abc import Collection
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device


def take_turns(networks: Collection[torch.nn.Module], device: torch.device) -> None:
    """From now on, each of `networks` comes to `device` for its pass, and the others leave it.

    Called again with more networks, it holds for all of them.
    """
    on_device: list[torch.nn.Module] = []
    for network in networks:
        others = [other for other in networks if other is not network]
        add_hook_to_module(network, _Turn(others, on_device, device))


class _Turn(ModelHook):
    def __init__(
        self,
        others: list[torch.nn.Module],
        on_device: list[torch.nn.Module],
        device: torch.device,
    ) -> None:
        self._others = others
        self._on_device = on_device  # shared by all: whose turn it is
        self.execution_device = device  # where pipelines make the network's inputs

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # Asking a network to go where it is takes milliseconds, in each step.
        if self._on_device != [module]:
            self._on_device.clear()
            for other in self._others:
                other.to("cpu")
            module.to(self.execution_device)
            self._on_device.append(module)
        return tuple(send_to_device(inputs, self.execution_device) for inputs in (args, kwargs))

    def forget_whose_turn_it_is(self) -> None:
        self._on_device.clear()


def send_home(networks: Collection[torch.nn.Module]) -> None:
    """All of them leave the device, until one's turn comes again."""
    for network in networks:
        hook = getattr(network, "_hf_hook", None)
        if isinstance(hook, _Turn):
            hook.forget_whose_turn_it_is()
        network.to("cpu")
