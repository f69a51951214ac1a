"""`make run` takes torch without CUDA where there is no NVIDIA GPU, and nothing else from there.
With the real pip, and two indexes of tiny wheels."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.tools import package_index
from tools import torch_index

REPOSITORY = Path(__file__).resolve().parents[2]
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}  # on a machine that has one, too

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no index is asked")


def _torch_line() -> str:
    """torch's line of requirements.txt, as it stands."""
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith("torch==")]
    return line


VERSION = _torch_line().split()[0].removeprefix("torch==")


@dataclass
class Indexes:
    usual: str
    cpu: str


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Indexes]:
    """Both have torch. The index of CPU builds also has a newer version of what torch needs."""
    usual, cpu = tmp_path_factory.mktemp("usual"), tmp_path_factory.mktemp("cpu")
    package_index.add_wheel(usual, "torch", VERSION, needs=["filelock"])
    package_index.add_wheel(usual, "filelock", "1.0")
    package_index.add_wheel(cpu, "torch", f"{VERSION}+cpu", needs=["filelock"])
    package_index.add_wheel(cpu, "filelock", "99.0")
    with package_index.serve(usual) as usual_url, package_index.serve(cpu) as cpu_url:
        yield Indexes(usual_url, cpu_url)


@pytest.fixture
def slow_index() -> Iterator[str]:
    """Each byte of its answer comes soon, the whole answer never."""
    closed = Event()

    def answer() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            while not closed.wait(0.05):
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        closed.set()
        thread.join()


@pytest.fixture
def closed_index() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def _torch_that_pip_takes(option: str, usual: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-"]
    command += ["--ignore-installed", "--no-deps", f"torch=={VERSION}", *option.split()]
    environment = package_index.environment(PIP_INDEX_URL=usual)
    report = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    [package] = json.loads(report)["install"]
    return str(package["metadata"]["version"])


def test_without_a_gpu_pip_takes_the_cpu_build(indexes: Indexes) -> None:
    option, _ = torch_index.choose(indexes.cpu, "Linux", gpu=False)
    assert _torch_that_pip_takes(option, indexes.usual) == f"{VERSION}+cpu"


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False)])
def test_with_a_gpu_and_off_linux_pip_takes_the_usual_build(
    indexes: Indexes, system: str, gpu: bool
) -> None:
    option, _ = torch_index.choose(indexes.cpu, system, gpu)
    assert _torch_that_pip_takes(option, indexes.usual) == VERSION


def test_pip_takes_the_usual_build_where_the_index_of_cpu_builds_is_down(
    indexes: Indexes, closed_index: str
) -> None:
    option, reason = torch_index.choose(closed_index, "Linux", gpu=False)
    assert _torch_that_pip_takes(option, indexes.usual) == VERSION
    assert "refused" in reason


def test_an_index_without_torch_is_not_used(indexes: Indexes) -> None:
    option, reason = torch_index.choose(f"{indexes.usual}/nothing", "Linux", gpu=False)
    assert option == ""
    assert "404" in reason


def test_an_index_that_takes_too_long_is_given_up(
    slow_index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_index, "PATIENCE_S", 0.3)
    started = time.monotonic()
    option, reason = torch_index.choose(slow_index, "Linux", gpu=False)
    assert option == ""
    assert "no answer" in reason
    assert time.monotonic() - started < 2


@on_linux
def test_it_needs_no_package_prints_the_option_alone_and_says_why(indexes: Indexes) -> None:
    # -S: the standard library alone.
    command = [sys.executable, "-S", "-m", "tools.torch_index", indexes.cpu]
    environment = package_index.environment(**NO_GPU)
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"--extra-index-url {indexes.cpu}\n"
    assert done.stderr.startswith("torch: the CPU build, for there is no NVIDIA GPU")
    assert done.stderr.count("\n") == 1


@on_linux
def test_make_takes_torch_alone_from_the_index_of_cpu_builds(
    indexes: Indexes, tmp_path: Path
) -> None:
    (tmp_path / "requirements.txt").write_text(f"{_torch_line()}\n", encoding="utf-8")
    command = ["make", "--makefile", f"{REPOSITORY / 'Makefile'}", "venv/.worker", "VENV=venv"]
    command += [f"PYTHON={sys.executable}", f"TORCH_INDEX={indexes.cpu}"]
    environment = package_index.environment(
        PIP_INDEX_URL=indexes.usual, PYTHONPATH=str(REPOSITORY), **NO_GPU
    )
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    installed = {path.name for path in tmp_path.glob("venv/lib/*/site-packages/*.dist-info")}
    assert f"torch-{VERSION}+cpu.dist-info" in installed
    assert "filelock-1.0.dist-info" in installed  # and not 99.0
