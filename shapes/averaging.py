"""The running average of a module's weights, which is the result of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average that starts fast: the decay grows with the updates."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = list(module.parameters())
        self.weights: list[Tensor] = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self._live], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights."""
        live = [parameter.detach().clone() for parameter in self._live]
        self._assign(self.weights)
        try:
            yield
        finally:
            self._assign(live)

    @torch.no_grad()
    def _assign(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self._live, weights, strict=True):
            parameter.copy_(weight)
