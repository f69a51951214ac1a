"""Reading weights: all networks side by side, by several threads, straight to the device.

`from_pretrained` reads one network after the other with one thread, and two calls at once would
disturb each other: it sets process-wide defaults while it builds a network.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sdxl_worker.errors import ModelError
from sdxl_worker.gpu import choose_device
from sdxl_worker.loading.model_dir import ModelDir
from sdxl_worker.placement import Placement, fits

log = logging.getLogger(__name__)

THREADS = 8
# Large enough to make opening the file again negligible, small enough to spread a UNet.
PART_BYTES = 256 * 1024**2

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """The tensors of a model's networks, while they are being read."""

    model_dir: ModelDir
    placement: Placement
    parts: dict[str, list[Future[Tensors]]]
    """Of each network, by its name in `NETWORKS`."""

    def take(self, network: str) -> Tensors:
        """All tensors of one network, once they are read. They are handed over, not kept, to the
        stream that this is called on.

        Raises:
            ModelError: a file cannot be read.
        """
        tensors: Tensors = {}
        for part in self.parts.pop(network):
            tensors |= part.result()
        for tensor in tensors.values():
            if tensor.is_cuda:
                # What is freed while this stream has yet to read it, as where a network is laid out
                # otherwise, must not be written to by threads that go on reading.
                tensor.record_stream(torch.cuda.current_stream())
        return tensors


def choose_placement(files: Mapping[str, list[Path]], dtype_name: str | None) -> Placement:
    """On the GPU if there is one; resident if the weights leave room to work.

    Args:
        files: of each network. A file that several networks share is counted once, as a whole.
        dtype_name: None for the default, float16 on a GPU and float32 on a CPU.

    Raises:
        ModelError: there is a GPU that cannot be used, or a file that cannot be read.
    """
    device = choose_device()
    on_gpu = device.type == "cuda"
    dtype = _dtype(dtype_name, device)
    if not on_gpu:
        if dtype == torch.float16:
            log.warning(
                "DTYPE is float16 and there is no GPU: CPUs without fp16 of their own take "
                "hundreds of times longer for it; take bfloat16, or leave DTYPE unset"
            )
        return Placement(device, dtype, resident=True)
    weights_bytes = bytes_of(files, dtype_name)
    free_bytes = torch.cuda.mem_get_info()[0]
    resident = fits(weights_bytes, free_bytes)
    log.info(
        "weights %.1f GB, free on the GPU %.1f GB: %s",
        weights_bytes / 1e9,
        free_bytes / 1e9,
        "resident" if resident else "too small, so models are offloaded to the host in turn",
    )
    return Placement(device, dtype, resident)


def bytes_of(files: Mapping[str, list[Path]], dtype_name: str | None) -> int:
    """What the weights in files take in memory.

    Args:
        dtype_name: as for `choose_placement`.

    Raises:
        ModelError: as `choose_placement`.
    """
    numbers = sum(_numbers(path) for path in {path for paths in files.values() for path in paths})
    return numbers * _dtype(dtype_name, choose_device()).itemsize


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    return getattr(torch, name or ("float16" if device.type == "cuda" else "float32"))


def start_reading(
    model_dir: ModelDir, files: Mapping[str, list[Path]], placement: Placement
) -> Weights:
    """Begin to read the weights of a model, network by network, and do not wait for them.

    Args:
        files: of each network, in the order to read them.

    Raises:
        ModelError: a file cannot be read.
    """
    target = placement.device if placement.resident else torch.device("cpu")
    with_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="weights")
    parts = {
        network: [
            with_threads.submit(_read, path, names, target, placement.dtype)
            for path in paths
            for names in _parts(path, model_dir.prefix(network))
        ]
        for network, paths in files.items()
    }
    with_threads.shutdown(wait=False)
    return Weights(model_dir, placement, parts)


def _read(path: Path, names: list[str], device: torch.device, dtype: torch.dtype) -> Tensors:
    with _opened(path) as file, _on_own_stream(device):
        there = set(file.offset_keys())
        tensors = {}
        for name in names:
            scales = [scale for scale in _scale_names(name) if scale in there]
            scale = file.get_tensor(scales[0]) if scales else None
            tensors[name] = _to(file.get_tensor(name), device, dtype, scale)
        return tensors


@contextlib.contextmanager
def _on_own_stream(device: torch.device) -> Iterator[None]:
    """What is copied to a GPU inside does not wait for what it draws meanwhile, as the refiner's
    weights would behind the base's first picture, and is there when this ends.

    One stream for all threads: torch keeps freed memory for the stream that it was taken on.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _to(
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    # In one call, torch would round on the host.
    moved = tensor.to(device)
    if scale is not None:
        moved = moved.float() * scale.float().to(device)
    return moved.to(dtype) if moved.is_floating_point() else moved


# What ComfyUI writes beside a weight in fp8, as X.scale_weight or X.weight_scale beside X.weight:
# the numbers are to be multiplied with it.
SCALES = ("scale_weight", "weight_scale")
# And what only its own arithmetic in fp8 needs.
OF_FP8 = (*SCALES, "scale_input", "input_scale", "scaled_fp8", "comfy_quant")


def _scale_names(name: str) -> list[str]:
    module, _, kind = name.rpartition(".")
    return [f"{module}.{scale}" for scale in SCALES] if kind == "weight" else []


def _parts(path: Path, prefix: str = "") -> Iterator[list[str]]:
    """The names of a file's tensors that begin with `prefix`, in the order they lie there, cut into
    parts."""
    part: list[str] = []
    size = 0
    with _opened(path) as file:
        for name in file.offset_keys():
            if not name.startswith(prefix) or name.rpartition(".")[2] in OF_FP8:
                continue
            part.append(name)
            size += math.prod(file.get_slice(name).get_shape()) * 2  # 2 bytes a number, or more
            if size >= PART_BYTES:
                yield part
                part, size = [], 0
    if part:
        yield part


def _numbers(path: Path) -> int:
    with _opened(path) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.offset_keys())


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"MODEL_DIR: {path} cannot be read: {error}") from error
