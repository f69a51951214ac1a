"""Networks that stand beside a model, such as a ControlNet: loaded when a request first asks."""

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sdxl_worker.placement import Placement


class CompanionFiles(Protocol):
    """Where a companion is loaded from: found, and checked as far as that takes no time."""

    @property
    def key(self) -> Hashable:
        """The same for the same files, loaded in the same way."""

    @property
    def title(self) -> str:
        """For logs, progress and messages."""

    def size_bytes(self, dtype: torch.dtype) -> int:
        """What it will take in memory.

        Raises:
            ModelError: a file cannot be read.
        """

    def load(self, placement: Placement) -> torch.nn.Module:
        """The network: on the device, or on the host where networks take turns.

        Raises:
            ModelError: it cannot be loaded; the message begins with the setting.
        """


@dataclass(frozen=True)
class Companion:
    """One that is loaded."""

    title: str
    placement: Placement
    network: torch.nn.Module

    def networks(self) -> dict[str, torch.nn.Module]:
        return {self.title: self.network}

    @property
    def device(self) -> torch.device:
        return self.placement.device


@contextlib.contextmanager
def at_work(network: Any, placement: Placement) -> Iterator[None]:
    """Around the passes of a companion: where networks take turns, it comes to the device only for
    these."""
    if placement.resident:
        yield
        return
    network.to(placement.device)
    try:
        yield
    finally:
        network.to("cpu")
