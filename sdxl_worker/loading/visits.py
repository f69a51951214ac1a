"""Networks that wait on the host and come to the device for a while.

What a network was on the host stays there meanwhile, pinned: a GPU copies faster from memory that
is, and nothing has to be copied back but what was changed, as by a LoRA.
"""

import logging
from typing import Any

import torch

from sdxl_worker.host_memory import free_host_bytes

log = logging.getLogger(__name__)


_State = tuple[int, int, torch.dtype, tuple[int, ...]]


class Visit:
    """A network's stay on a device. It comes at once, wholly or not at all."""

    def __init__(self, network: Any, device: torch.device) -> None:
        """
        Args:
            network: on the host.
        """
        self._there: list[tuple[torch.Tensor, torch.Tensor, _State]] = []
        """Of each tensor: what it was on the host, and how it came, as `_state`."""
        tensors = [*network.parameters(), *network.buffers()]
        pins = device.type == "cuda" and _can_be_pinned(tensors)
        try:
            for tensor in tensors:
                host = _pinned(tensor.data) if pins else tensor.data
                tensor.data = host.to(device, non_blocking=True, copy=True)
                self._there.append((tensor, host, _state(tensor)))
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """It leaves."""
        while self._there:
            tensor, host, state = self._there[-1]
            here = tensor.data
            if _state(tensor) == state:
                tensor.data = host
            elif (here.dtype, here.shape, here.stride()) == (host.dtype, host.shape, host.stride()):
                tensor.data = host.copy_(here)  # pinned, it need not be pinned again
            else:
                tensor.data = here.to(host.device, copy=True)
            self._there.pop()


def _state(tensor: torch.Tensor) -> _State:
    """It changes with what is written to a tensor, and where its data is replaced: by other data at
    the same address, if it is of another format or layout."""
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.stride()


def _can_be_pinned(tensors: list[torch.Tensor]) -> bool:
    """Pinned memory is given in powers of two: all of it may take twice as much as it has."""
    missing = sum(tensor.nbytes for tensor in tensors if not tensor.is_pinned())
    return 2 * missing <= free_host_bytes()


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return tensor.pin_memory()  # itself, where it is
    except RuntimeError as error:  # a limit of the container's
        log.warning("weights that wait on the host cannot be pinned: %s", error)
        return tensor
