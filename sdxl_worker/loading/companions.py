"""Networks that stand beside a model, such as a ControlNet: loaded when a request first asks."""

import contextlib
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from sdxl_worker.errors import BrokenFilesError
from sdxl_worker.loading.visits import Visit
from sdxl_worker.placement import Placement
from sdxl_worker.safetensors_header import NotSafetensorsError, read_header

# Of one file each reads a run of tensors, as they lie there.
THREADS = 8


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


def read_tensors(
    paths: Sequence[Path], placement: Placement, setting: str
) -> dict[str, torch.Tensor]:
    """The tensors of safetensors files, where and in the format that `placement` has them.

    Args:
        setting: whose folder they are in, for messages.

    Raises:
        BrokenFilesError: a file cannot be read.
    """
    device = placement.device if placement.resident else torch.device("cpu")

    def read(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
        with safe_open(path, framework="pt") as file:
            return {name: to_dtype(file.get_tensor(name).to(device)) for name in names}

    def to_dtype(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(placement.dtype) if tensor.is_floating_point() else tensor

    tensors: dict[str, torch.Tensor] = {}
    path = None
    try:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="companion") as pool:
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    names = list(file.offset_keys())
                run = -(-len(names) // THREADS) or 1
                runs = [names[i : i + run] for i in range(0, len(names), run)]
                for part in pool.map(read, [path] * len(runs), runs):
                    tensors |= part
    except (OSError, SafetensorError) as error:
        name = path.name if path else ""
        raise BrokenFilesError(f"{setting}: {name} cannot be read: {error}") from error
    return tensors


def count_numbers(paths: Iterable[Path], setting: str) -> int:
    """How many numbers the tensors of safetensors files have. Only the headers are read.

    Args:
        setting: as for `read_tensors`.

    Raises:
        BrokenFilesError: a file cannot be read.
    """
    count = 0
    for path in paths:
        try:
            count += sum(map(math.prod, read_header(path).shapes.values()))
        except (OSError, NotSafetensorsError) as error:
            # Files of one name lie in many folders.
            name = f"{path.parent.name}/{path.name}"
            raise BrokenFilesError(f"{setting}: {name} cannot be read: {error}") from error
    return count


@contextlib.contextmanager
def at_work(network: Any, placement: Placement) -> Iterator[None]:
    """Around the passes of a companion: one that waits on the host comes to the device only for
    these. Where it is, is seen from itself: another model may have had it loaded, one whose
    networks do not take turns, or do.
    """
    parameter = next(network.parameters(), None)
    if parameter is None or parameter.device.type == placement.device.type:
        yield
        return
    visit = Visit(network, placement.device)
    try:
        yield
    finally:
        visit.end()
