"""The upscalers of `UPSCALER_DIR`: networks that spandrel knows, in files of any trainer."""

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdxl_worker.errors import BrokenFilesError, ModelError, RequestError
from sdxl_worker.placement import Placement
from sdxl_worker.safetensors_header import NotSafetensorsError, read_header

log = logging.getLogger(__name__)

LANCZOS = "lanczos"
SUFFIXES = (".safetensors", ".pth", ".pt")
MAX_SCALE = 8
# Of those that an error tells.
MAX_TOLD = 20
# Two of spandrel's architectures, which are no upscalers, take three names from it.
TORCHVISION = "torchvision.transforms.functional"


class Upscaler(torch.nn.Module):
    """A network that makes a picture `scale` times as large."""

    def __init__(self, descriptor: Any, title: str) -> None:
        """
        Args:
            descriptor: spandrel's `ImageModelDescriptor`.
        """
        super().__init__()
        self.title = title
        self.scale: int = descriptor.scale
        self._descriptor = descriptor
        self.network: torch.nn.Module = descriptor.model

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def forward(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """
        Args:
            pixels: RGB from 0 to 1, [1, 3, height, width], of any size: what the architecture wants
                more is added to the right and below, and cut off again.

        Returns:
            The same in the larger size. None: what came out are not numbers.
        """
        finite = []

        def look(_: Any, __: Any, output: Any) -> None:
            # spandrel brings what is infinite between 0 and 1.
            found = output[0] if isinstance(output, (tuple, list)) else output
            finite.append(found.isfinite().all())

        hook = self.network.register_forward_hook(look)
        try:
            larger = self._descriptor(pixels)
        finally:
            hook.remove()
        return larger if all(finite) and larger.isfinite().all() else None


@dataclass(frozen=True)
class UpscalerFiles:
    """`CompanionFiles` of an upscaler."""

    path: Path

    @property
    def key(self) -> Hashable:
        return self.path

    @property
    def title(self) -> str:
        return f"the upscaler {self.path.name}"

    def size_bytes(self, dtype: torch.dtype) -> int:  # noqa: ARG002  some take only their own
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise self._broken(f"cannot be read: {error.strerror}") from None

    def load(self, placement: Placement) -> torch.nn.Module:
        spandrel = _spandrel()
        tensors = self._tensors()
        try:
            descriptor = spandrel.MAIN_REGISTRY.load(tensors)
        except spandrel.UnsupportedModelError:
            raise self._error("is no network of a kind that spandrel knows") from None
        except Exception as error:  # an architecture that is not what it looks like
            raise self._broken(f"cannot be loaded: {type(error).__name__}: {error}") from None
        if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.purpose != "SR":
            raise self._error(
                f"is a network for something else ({descriptor.purpose}), not an upscaler"
            )
        self._check(descriptor)
        upscaler = Upscaler(descriptor, self.title).eval().requires_grad_(False)
        device = placement.device if placement.resident else torch.device("cpu")
        return upscaler.to(device, _dtype_of(descriptor, placement))

    def _check(self, descriptor: Any) -> None:
        channels = {descriptor.input_channels, descriptor.output_channels}
        if channels != {3}:
            raise self._error(f"is for pictures of {min(channels)} channels, not of 3 (RGB)")
        if not 1 <= descriptor.scale <= MAX_SCALE:
            raise self._error(
                f"makes pictures {descriptor.scale} times as large; the most is {MAX_SCALE}"
            )

    def _tensors(self) -> Mapping[str, Any]:
        try:
            if self.path.suffix == ".safetensors":
                return load_file(self.path)
            # What a pickle names besides tensors is refused, and no TorchScript is read: either
            # could run anything.
            tensors = torch.load(self.path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise self._broken(f"cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise self._broken(f"is broken: {error}") from None
        except Exception as error:  # torch raises all kinds of them
            raise self._broken(
                "is refused: it holds more than tensors, or is broken "
                f"({type(error).__name__}); convert it to safetensors"
            ) from None
        if not isinstance(tensors, dict):
            raise self._error("holds no tensors by name")
        return tensors

    def _error(self, what: str) -> ModelError:
        return ModelError(f"UPSCALER_DIR: {self.path.name} {what}")

    def _broken(self, what: str) -> BrokenFilesError:
        return BrokenFilesError(f"UPSCALER_DIR: {self.path.name} {what}")


def find_upscaler(name: str, folder: Path | None, field: str) -> UpscalerFiles | None:
    """
    Args:
        name: "lanczos", or a file name, whose ending may be left out.
        folder: `UPSCALER_DIR`.
        field: of the request, for messages.

    Returns:
        None for "lanczos", which needs no file.

    Raises:
        RequestError: there is no such upscaler, and the message tells which there are; or its
            file is broken.
    """
    if name == LANCZOS:
        return None
    if folder is None:
        raise RequestError(f"{field}: this worker has no upscaler but lanczos; got {name}")
    try:
        files = _files_in(folder)
    except OSError as error:
        raise RequestError(
            f"{field}: the worker's upscalers cannot be read: {error.strerror}"
        ) from None
    # One with its ending comes first: "a.pth" may be the name of "a.pth.safetensors" too.
    found = next((path for path in files if path.name == name), None) or next(
        (path for path in files if path.stem == name), None
    )
    if found is None:
        raise RequestError(f"{field}: this worker has no upscaler {name}; it has {_told(files)}")
    if importlib.util.find_spec("spandrel") is None:
        raise RequestError(
            f"{field}: this worker lacks the package spandrel, which {found.name} needs: its owner "
            "installs requirements-control.txt; send lanczos"
        )
    if found.suffix == ".safetensors":
        try:
            read_header(found)
        except (NotSafetensorsError, OSError) as error:
            log.warning("UPSCALER_DIR: %s is %s", found.name, error)
            raise RequestError(
                f"{field}: {found.name} cannot be read as an upscaler; the worker's owner should "
                "fetch it again"
            ) from None
    return UpscalerFiles(found)


def names_of_upscalers(folder: Path | None) -> list[str]:
    """As requests name them, "lanczos" first.

    Args:
        folder: `UPSCALER_DIR`. One that cannot be read has none.
    """
    try:
        return _names(_files_in(folder)) if folder else [LANCZOS]
    except OSError:
        return [LANCZOS]


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def _names(files: list[Path]) -> list[str]:
    return [LANCZOS, *dict.fromkeys(path.stem for path in files)]


def _told(files: list[Path]) -> str:
    names = _names(files)
    more = len(names) - MAX_TOLD
    return ", ".join(names[:MAX_TOLD]) + (f" and {more} more" if more > 0 else "")


def _dtype_of(descriptor: Any, placement: Placement) -> torch.dtype:
    """float16 where the worker draws in 16 bits and the architecture takes it: where it overflows,
    the picture is made again in float32. bfloat16 has fewer bits than the pictures."""
    half = placement.dtype != torch.float32 and descriptor.supports_half
    return torch.float16 if half else torch.float32


def _spandrel() -> Any:
    """
    Raises:
        ModelError: it is not installed.
    """
    try:
        with _without_torchvision():
            return importlib.import_module("spandrel")
    except ImportError as error:
        raise ModelError(
            f"UPSCALER_DIR: spandrel cannot be imported ({error}); install requirements-control.txt"
        ) from None


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """Around the first import of spandrel: where there is no torchvision, something stands in for
    it meanwhile. The worker has none on purpose: transformers imports it wherever it is."""
    if "spandrel" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    stand_in = ModuleType(TORCHVISION)
    vars(stand_in)["__getattr__"] = _nothing
    sys.modules[TORCHVISION] = stand_in
    try:
        yield
    finally:
        del sys.modules[TORCHVISION]


def _nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return None
