"""Questions about the GPU. torch is used only where it is imported already, or must be."""

import functools
import gc
import logging
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import ModelError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# What NVIDIA's driver puts there: for each GPU, and for Windows' Subsystem for Linux.
DEVICE_FILES = ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so*")
ON_CPU_ON_PURPOSE = "to serve on the CPU on purpose, set CUDA_VISIBLE_DEVICES=-1"


def gpu_is_there() -> bool:
    """Whether the machine has an NVIDIA GPU that this process is meant to see. Needs no torch."""
    # Unset means all of them; an empty value and -1 mean none, to CUDA and to torch.
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(any(Path("/").glob(pattern.lstrip("/"))) for pattern in DEVICE_FILES)


def choose_device() -> "torch.device":
    """The GPU, or the CPU where there is no GPU at all.

    Raises:
        ModelError: there is a GPU that this process cannot use. Serving on the CPU instead would
            let paid jobs run into their timeout.
    """
    import torch

    # Not at the top: `make` asks this module for a GPU before any package is installed.
    from sdxl_worker.settings import is_on_runpod

    if not gpu_is_there() and not torch.cuda.is_available():
        if is_on_runpod():
            log.warning(
                "THERE IS NO GPU: this worker serves on its CPU, where a picture of SDXL takes "
                "many minutes. Choose a GPU in the endpoint's settings"
            )
        return torch.device("cpu")
    if torch.version.cuda is None and not torch.cuda.is_available():
        raise ModelError(
            "there is a GPU, and this build of torch is for CPUs: install the one for CUDA "
            f"(pip install torch=={torch.__version__.partition('+')[0]}), or, {ON_CPU_ON_PURPOSE}"
        )
    try:
        torch.cuda.init()
        torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
    except Exception as error:
        raise ModelError(
            f"there is a GPU that cannot be used: {error}. This torch needs a driver for CUDA "
            f"{torch.version.cuda} or newer: choose {torch.version.cuda} and every newer version "
            "as the endpoint's CUDA versions, or update the driver; where that is so already, the "
            f"GPU is broken; {ON_CPU_ON_PURPOSE}"
        ) from error
    if torch.version.cuda is None:
        return torch.device("cuda")  # ROCm, whose architectures have other names
    if not _has_code_for(capability, torch.cuda.get_arch_list()):
        raise ModelError(
            f"there is a GPU that cannot be used: {name} has compute capability "
            f"{capability[0]}.{capability[1]}, and this torch has code for "
            f"{', '.join(torch.cuda.get_arch_list())} alone: choose another GPU, or a build of "
            f"torch for it; {ON_CPU_ON_PURPOSE}"
        )
    return torch.device("cuda")


def _has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a build for `architectures` ("sm_80", "compute_90") runs on that capability.

    Machine code (sm) runs on later minor versions of its major version, intermediate code (compute)
    on every later one: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = "".join(letter for letter in number if letter.isdigit())  # "90a" is 90
        major, minor = int(digits[:-1]), int(digits[-1])
        same_major = major == capability[0] and minor <= capability[1]
        if same_major or (kind == "compute" and (major, minor) <= capability):
            return True
    return False


def is_broken() -> bool:
    """Whether the process can no longer use its GPU, as after an illegal memory access.

    Such an error stays: every later call to the device raises it again, and so does this one.
    """
    torch = _torch_with_gpu()
    if torch is None:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# What CUDA, its libraries, Triton and torch's CPU part say: they have no type for it.
SIGNS_OF_TOO_LITTLE_MEMORY = (
    "out of memory",
    "_ALLOC_FAILED",  # cuBLAS
    "_ALLOCATION_FAILED",  # cuDNN
    "unable to find an engine",  # cuDNN, for whose workspace there is no room
    "DefaultCPUAllocator",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the memory did not do, as far as an error, or what it came from, tells."""
    import torch

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(
            sign in str(error) for sign in SIGNS_OF_TOO_LITTLE_MEMORY
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_memory() -> None:
    """Give back what torch keeps for reuse: in other sizes, it may be of no use."""
    gc.collect()
    torch = _torch_with_gpu()
    if torch is not None:
        torch.cuda.empty_cache()


def free_pinned_memory() -> None:
    """Give back to the host the pinned memory that torch keeps for reuse."""
    torch = _torch_with_gpu()
    if torch is not None:
        torch._C._host_emptyCache()


@functools.cache
def graph_memory() -> Any:
    """The one pool of memory that all CUDA graphs share. Made at the first call."""
    import torch

    return torch.cuda.graph_pool_handle()


def idle_graph_bytes() -> int:
    """GPU memory that CUDA graphs keep for their replays. torch counts it as free."""
    if graph_memory.cache_info().currsize == 0:
        return 0
    import torch

    segments = torch.cuda.memory_snapshot(graph_memory(), include_traces=False)
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


def free_bytes(device: "torch.device") -> int | None:
    """What is free for new tensors: what CUDA has left, and what torch holds for reuse. None for a
    CPU."""
    if device.type != "cuda":
        return None
    import torch

    reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + reusable - idle_graph_bytes()


def allocated_bytes() -> int | None:
    """GPU memory in tensors. None without a GPU."""
    torch = _torch_with_gpu()
    return None if torch is None else int(torch.cuda.memory_allocated())


def peak_memory_bytes() -> int:
    """The peak of GPU memory since `reset_peak_memory`; without a GPU, of the whole process."""
    torch = _torch_with_gpu()
    if torch is not None:
        return int(torch.cuda.max_memory_allocated()) + idle_graph_bytes()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024


def reset_peak_memory() -> None:
    torch = _torch_with_gpu()
    if torch is not None:
        torch.cuda.reset_peak_memory_stats()


def _torch_with_gpu() -> Any:
    """torch, if it is imported already and uses a GPU. Asking must not cost seconds of import."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch
