"""Compiling, at the start alone, and keeping what was compiled for the next worker with the same
GPU and versions.

What is kept are the artifacts of `torch.compiler.save_cache_artifacts`. They hold code, and are
taken only from the folder that the settings name.
https://docs.pytorch.org/tutorials/recipes/torch_compile_caching_tutorial.html
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import _config as shapes_config

import sdxl_worker
from sdxl_worker.field_types import SIDE_MULTIPLE_PX
from sdxl_worker.placement import Placement
from sdxl_worker.versions import library_versions

log = logging.getLogger(__name__)

THAT_COMPILE = frozenset({"compile_blocks", "compile_unet", "compile_decoder"})


def compiles(optimizations: Collection[str]) -> bool:
    return not THAT_COMPILE.isdisjoint(optimizations)


@contextlib.contextmanager
def at_the_start(optimizations: Collection[str]) -> Iterator[None]:
    """What is drawn inside, on this thread, is compiled: each network once, for all numbers of
    rows, sizes and lengths of prompts. From then on torch compiles nothing in this process: no job
    waits for it, which nobody could cancel meanwhile. What there is no code for runs without.

    By default torch makes code for one shape, and makes it anew as soon as the width, the height,
    the rows or the prompt's length differ for the first time, and for one row.
    """
    if not compiles(optimizations):
        yield
        return
    with (
        torch.compiler.set_stance("default"),
        torch._dynamo.config.patch(assume_static_by_default=False),
        # Without these the code for one square picture would be for squares, and never for one row.
        shapes_config.patch(  # type: ignore[attr-defined]
            use_duck_shape=False, backed_size_oblivious=True
        ),
    ):
        yield
    torch.compiler.set_stance("eager_on_recompile")


class Compiled:
    """A function of latents, [rows, channels, height / 8, width / 8], and of other tensors. The log
    names each shape of latents that there is no code for.
    """

    def __init__(self, function: Callable[..., Any], title: str) -> None:
        """
        Args:
            title: of the network that it calls, for the log.
        """
        self._function = function
        self._title = title
        self._told: set[torch.Size] = set()
        self._compiled = torch.compile(self._run, fullgraph=True)

    def __call__(self, latents: torch.Tensor, *others: torch.Tensor) -> Any:
        # The code is for one memory order. A copy has it in one row, too, where any stride counts
        # as contiguous.
        return self._compiled(*map(_laid_out, (latents, *others)))

    def _run(self, latents: torch.Tensor, *others: torch.Tensor) -> Any:
        if not torch.compiler.is_compiling():  # in the code that is made of this, nothing is left
            self._tell(latents.shape)
        return self._function(latents, *others)

    def _tell(self, shape: torch.Size) -> None:
        if shape in self._told:
            return
        self._told.add(shape)
        rows, _, height, width = shape
        log.info(
            "COMPILE=full: the %s has no compiled code for %dx%d px in %d rows, and runs without",
            self._title,
            width * SIDE_MULTIPLE_PX,
            height * SIDE_MULTIPLE_PX,
            rows,
        )


def _laid_out(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def kept(
    folder: Path | None,
    optimizations: Collection[str],
    placement: Placement,
    network_configs: Mapping[str, str],
) -> Iterator[None]:
    """Around what compiles: give torch what an earlier worker compiled, or keep what this one did.

    Does nothing where nothing is compiled, or without a folder.

    Args:
        network_configs: the configuration files' texts, by network.
    """
    if folder is None or not compiles(optimizations):
        _warn_of_a_long_start(optimizations)
        yield
        return
    path = folder / _file_name(optimizations, placement, network_configs)
    loaded = _load(path)
    if not loaded:
        _warn_of_a_long_start(optimizations)
    yield
    if not loaded:
        _save(path)


def _warn_of_a_long_start(optimizations: Collection[str]) -> None:
    on_platform = bool(os.environ.get("RUNPOD_WEBHOOK_GET_JOB"))
    if (
        on_platform
        and "compile_unet" in optimizations
        and not os.environ.get("RUNPOD_INIT_TIMEOUT")
    ):
        log.warning(
            "COMPILE=full can take longer than the 7 minutes after which the platform replaces a "
            "worker that is not ready: set RUNPOD_INIT_TIMEOUT to more seconds, or let "
            "COMPILE_CACHE_DIR keep what is compiled"
        )


def _load(path: Path) -> bool:
    """Whether the file holds anything that torch can use."""
    if not path.is_file():
        log.info("%s is not there yet: compiling", path)
        return False
    try:
        artifacts = path.read_bytes()
    except OSError as error:
        log.warning("%s cannot be read, compiling anew: %s", path, error)
        return False
    # torch checks the artifacts, and takes none that are damaged.
    loaded = torch.compiler.load_cache_artifacts(artifacts) is not None
    if loaded:
        log.info("took what was compiled from %s", path)
    else:
        log.warning("%s is damaged, compiling anew", path)
    return loaded


def _save(path: Path) -> None:
    """Keep what this process compiled. If the folder cannot be written to, only warn."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other workers may write the same file: each writes its own, and moves it there whole.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_bytes(artifacts[0])
            whole.replace(path)
    except OSError as error:
        log.warning("what was compiled could not be kept in %s: %s", path, error)
        return
    log.info("kept what was compiled in %s, %.1f MB", path, len(artifacts[0]) / 1e6)


def _file_name(
    optimizations: Collection[str], placement: Placement, network_configs: Mapping[str, str]
) -> str:
    """One file for each combination of what decides the compiled code."""
    gpu = placement.device.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else platform.machine()
    key = {
        "device": device,
        "capability": torch.cuda.get_device_capability()
        if gpu
        else torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "versions": library_versions(quantized=not {"int8", "fp8"}.isdisjoint(optimizations)),
        "worker": sdxl_worker.__version__,
        "optimizations": sorted(optimizations),
        "dtype": str(placement.dtype),
        "networks": dict(network_configs),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    return f"{name}-{digest[:16]}.torchcompile"
