"""What is told of the GPU."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdxl_worker import gpu
from sdxl_worker.errors import ModelError
from tests.support import REPOSITORY


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


# --- choosing the device -------------------------------------------------------------------------


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver's file of a GPU, which is there once it is touched."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "DEVICE_FILES", (f"{tmp_path}/nvidia[0-9]*",))
    return tmp_path / "nvidia0"


def test_a_machine_without_a_gpu_serves_on_its_cpu_and_says_so_on_the_platform(
    card: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not card.exists()
    assert gpu.choose_device() == torch.device("cpu")
    assert caplog.text == ""
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1/job-take")
    assert gpu.choose_device() == torch.device("cpu")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("THERE IS NO GPU: this worker serves on its CPU")


def test_a_gpu_is_not_used_where_torch_is_built_for_cpus(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ModelError, match=r"^there is a GPU, and this build of torch is for CPUs"):
        gpu.choose_device()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_is_none(
    hidden: str, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.touch()
    assert gpu.gpu_is_there()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not gpu.gpu_is_there()
    assert gpu.choose_device() == torch.device("cpu")


def with_cuda(monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (8, 9)) -> None:
    """torch as it is on a GPU that works."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_120"])


def test_a_gpu_that_works_is_used(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card.touch()
    with_cuda(monkeypatch)
    assert gpu.choose_device() == torch.device("cuda")


@pytest.mark.parametrize("call", ["init", "mem_get_info"])
def test_a_driver_that_is_too_old_or_a_broken_card_ends_the_worker_with_what_to_change(
    call: str, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.touch()
    with_cuda(monkeypatch)

    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040)")

    monkeypatch.setattr(torch.cuda, call, fail)
    with pytest.raises(ModelError, match="too old") as caught:
        gpu.choose_device()
    message = str(caught.value)
    assert message.startswith("there is a GPU that cannot be used: The NVIDIA driver")
    assert "choose 13.0 and every newer version as the endpoint's CUDA versions" in message
    assert "set CUDA_VISIBLE_DEVICES=-1" in message


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 0), False), ((7, 5), True), ((8, 6), True), ((11, 0), False)]
)
def test_a_card_that_torch_has_no_code_for_ends_the_worker(
    capability: tuple[int, int], runs: bool, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.touch()
    with_cuda(monkeypatch, capability=capability)
    if runs:
        assert gpu.choose_device() == torch.device("cuda")
        return
    with pytest.raises(ModelError, match="this torch has code for sm_75, sm_80, sm_90, sm_120"):
        gpu.choose_device()


def test_intermediate_code_runs_on_what_came_later() -> None:
    assert gpu._has_code_for((12, 0), ["sm_90a", "compute_90"])
    assert not gpu._has_code_for((8, 0), ["sm_90a", "compute_90"])


def test_a_worker_with_a_gpu_that_it_cannot_use_does_not_start(card: Path) -> None:
    """As it is here, where torch is a build for CPUs, or cannot use a card that is no more than a
    file."""
    card.touch()
    script = (
        "import sys, handler; from sdxl_worker import gpu; "
        f"gpu.DEVICE_FILES = ({str(card)!r},); sys.argv[1:] = ['--test_input']; handler.main()"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"
    }
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("The worker cannot start. there is a GPU")
