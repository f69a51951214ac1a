"""CUDA graphs, recorded by a stand-in."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_worker import gpu
from sdxl_worker.speed import cuda_graphs


class Recording(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`: the kernels that ran, which always read from and write to
    the memory that they had. No Python code is run again."""

    def __init__(self) -> None:
        super().__init__()
        self._kernels: list[tuple[Any, Any, Any, Any]] = []
        self.replayed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._kernels.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, out in self._kernels:
            for place, value in zip(
                tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.fixture(scope="module")
def all_recordings() -> Iterator[list[Recording]]:
    """CUDA graphs on a CPU."""
    made: list[Recording] = []

    class Stream:
        def wait_stream(self, other: "Stream") -> None:
            pass

    @contextlib.contextmanager
    def record(graph: Recording, _pool: object, _stream: Stream, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local", "other threads bring weights meanwhile"
        made.append(graph)
        with graph:
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Recording)
        patch.setattr(torch.cuda, "graph", record)
        patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        gpu.graph_memory.cache_clear()
        cuda_graphs._stream.cache_clear()
        yield made
        gpu.graph_memory.cache_clear()
        cuda_graphs._stream.cache_clear()


@pytest.fixture
def recordings(all_recordings: list[Recording]) -> list[Recording]:
    """What is recorded during a test."""
    all_recordings.clear()
    return all_recordings
