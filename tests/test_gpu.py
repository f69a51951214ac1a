"""What is told of the GPU."""

import functools

import pytest
import torch

from sdxl_worker import gpu


def test_memory_that_recordings_keep_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "graph_memory", functools.cache(gpu.graph_memory.__wrapped__))
    assert gpu.idle_graph_bytes() == 0, "before the first recording"
    segments = [
        {"total_size": 100, "allocated_size": 30},
        {"total_size": 50, "allocated_size": 50},
    ]
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(
        torch.cuda, "memory_snapshot", lambda pool, **_: segments if pool == (0, 7) else []
    )
    gpu.graph_memory()
    assert gpu.idle_graph_bytes() == 70
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    assert gpu.peak_memory_bytes() == 1070


def test_without_a_gpu_nothing_is_broken() -> None:
    assert gpu.is_broken() is False


@pytest.mark.parametrize("broken", [True, False])
def test_a_broken_gpu_is_found_by_asking_it(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        if broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu.is_broken() is broken
