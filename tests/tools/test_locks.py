"""The image's locks are those of the requirements, whole, and made by `make lock`."""

import hashlib
import importlib.metadata
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import REPOSITORY
from tests.tools import package_index

# Each lock, and the file that it is made from; torch's line of requirements.txt is torch's input.
LOCKS = {
    "requirements-torch.lock": None,
    "requirements.lock": "requirements.txt",
    "builder/requirements.lock": "builder/requirements.txt",
    "requirements-control.lock": "requirements-control.txt",
}
IMAGE = {
    "python_version": "3.11",
    "python_full_version": "3.11.14",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "extra": "",
}


@dataclass
class Locked:
    version: str
    hashes: set[str]
    asked_for: bool
    """Whether it stands in the lock's input, and does not only come with another package."""


def read(path: Path) -> dict[str, Locked]:
    text = path.read_text(encoding="utf-8")
    locked = {}
    for block in re.split(r"^(?=[\w])", text, flags=re.MULTILINE)[1:]:
        [(name, version)] = re.findall(r"^([\w.-]+)==(\S+)", block)
        hashes = set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block))
        # What is read from standard input has no "via".
        asked_for = "# via" not in block or re.search(r"# .*-r \S+$", block, re.MULTILINE)
        locked[name] = Locked(version, hashes, bool(asked_for))
    return locked


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def asked_for(lock: dict[str, Locked]) -> dict[str, str]:
    return {name: one.version for name, one in lock.items() if one.asked_for}


TORCH, WORKER, BUILDER, CONTROL = (read(REPOSITORY / name) for name in LOCKS)


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_hashes(name: str) -> None:
    lock = read(REPOSITORY / name)
    assert lock
    assert [package for package, locked in lock.items() if not locked.hashes] == []


def test_the_locks_are_made_from_exactly_the_requirements() -> None:
    message = "run `make lock`"
    torch = asked_for(TORCH)
    assert list(torch) == ["torch"], message
    assert torch | asked_for(WORKER) == pins(REPOSITORY / "requirements.txt"), message
    assert asked_for(BUILDER) == pins(REPOSITORY / "builder/requirements.txt"), message
    assert asked_for(CONTROL) == pins(REPOSITORY / "requirements-control.txt"), message
    assert CONTROL.keys() == asked_for(CONTROL).keys()


def test_a_package_has_one_version_in_all_locks() -> None:
    assert not TORCH.keys() & WORKER.keys()
    assert not CONTROL.keys() & (TORCH | WORKER).keys()
    together = TORCH | WORKER
    for name, locked in BUILDER.items():
        assert together.get(name, locked) == locked or (
            together[name].version,
            together[name].hashes,
        ) == (locked.version, locked.hashes), name


def test_torch_is_the_build_with_cuda() -> None:
    """A lock made from an index of CPU builds has no libraries of CUDA."""
    assert "+" not in TORCH["torch"].version
    assert {"triton", "nvidia-cudnn-cu13"} <= TORCH.keys()


@pytest.mark.parametrize("lock", [TORCH | WORKER, BUILDER], ids=["worker", "builder"])
def test_what_a_locked_package_needs_is_locked(lock: dict[str, Locked]) -> None:
    """As far as this machine has the same version of it."""
    known = 0
    for name, locked in lock.items():
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if here.version != locked.version:
            continue
        known += 1
        for need in map(Requirement, here.requires or []):
            if need.marker is None or need.marker.evaluate(IMAGE):
                needed = lock.get(canonicalize_name(need.name))
                assert needed, f"{name} needs {need}: run `make lock`"
                assert need.specifier.contains(needed.version, prereleases=True), need
    assert known > len(lock) / 3


def test_there_is_one_opencv_and_no_torchvision() -> None:
    """Two builds of OpenCV overwrite each other's files, and one of them needs a display's library;
    transformers imports torchvision at each start where it is there."""
    every = TORCH | WORKER | BUILDER | CONTROL
    assert [name for name in every if name.startswith("opencv")] == ["opencv-python-headless"]
    assert not [name for name in every if name.startswith("torchvision")]


IMPORT_ALL = """
import importlib, sys
# What these packages declare and the locks have not got.
for name in ("flatbuffers", "matplotlib", "sympy", "requests"):
    sys.modules[name] = None
for name in ("cv2", "onnxruntime", "rtmlib", "einops"):
    importlib.import_module(name)
from rtmlib import RTMPose, YOLOX
assert "torchvision" not in sys.modules
assert "google.protobuf" not in sys.modules
"""


def test_what_makes_maps_is_imported_without_what_is_left_out() -> None:
    pytest.importorskip("rtmlib")
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_an_extra_needs_is_locked_but_for_what_is_left_out() -> None:
    """rtmlib would bring two more builds of OpenCV, spandrel torchvision; onnxruntime reads
    its own models without flatbuffers."""
    left_out: dict[str, set[str]] = {}
    together = TORCH | WORKER | CONTROL
    for name in CONTROL:
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            if need.marker is None or need.marker.evaluate(IMAGE):
                needed = together.get(canonicalize_name(need.name))
                if needed is None:
                    left_out.setdefault(name, set()).add(need.name)
                else:
                    assert need.specifier.contains(needed.version, prereleases=True), need
    assert left_out == {
        "onnxruntime": {"flatbuffers"},
        "rtmlib": {"opencv-contrib-python", "opencv-python"},
        "spandrel": {"torchvision"},
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Requirements of tiny packages, and an index that has them, for `make lock`."""
    index = tmp_path / "index"
    package_index.add_wheel(index, "torch", "2.13.0", needs=["filelock", "cuda; os_name=='posix'"])
    for name in ("filelock", "cuda", "idna"):
        package_index.add_wheel(index, name, "1.0")
    package_index.add_wheel(index, "requests", "1.0", needs=["idna", "filelock"])
    package_index.add_wheel(index, "tqdm", "1.0", needs=["filelock"])
    (tmp_path / "builder").mkdir()
    (tmp_path / "requirements.txt").write_text("requests==1.0\ntorch==2.13.0  # a comment\n")
    (tmp_path / "builder/requirements.txt").write_text("tqdm==1.0\n")
    package_index.add_wheel(index, "rtmlib", "1.0", needs=["idna", "opencv-python"])
    (tmp_path / "requirements-control.txt").write_text("rtmlib==1.0\n")
    return tmp_path


def make_lock(project: Path, *arguments: str) -> list[dict[str, Locked]]:
    environment = Path(sys.prefix)
    command = ["make", "--makefile", str(REPOSITORY / "Makefile"), f"VENV={environment}"]
    command += [f"--old-file={environment}/.dev", "lock", *arguments]
    with package_index.serve(project / "index") as url:
        variables = package_index.environment(UV_DEFAULT_INDEX=url, UV_NO_CACHE="1")
        done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [read(project / name) for name in LOCKS]


def test_make_lock_locks_torch_with_what_it_needs_apart(project: Path) -> None:
    torch, worker, builder, _ = make_lock(project)
    assert torch.keys() == {"torch", "filelock", "cuda"}
    assert worker.keys() == {"requests", "idna"}
    assert builder.keys() == {"tqdm", "filelock"}
    assert asked_for(torch) | asked_for(worker) == pins(project / "requirements.txt")
    [wheel] = (project / "index" / "requests").glob("*.whl")
    assert worker["requests"].hashes == {hashlib.sha256(wheel.read_bytes()).hexdigest()}


def test_make_lock_locks_the_extras_without_what_they_declare(project: Path) -> None:
    *_, control = make_lock(project)
    assert control.keys() == {"rtmlib"}


def test_make_lock_keeps_versions_until_it_is_to_upgrade(project: Path) -> None:
    make_lock(project)
    for name in ("filelock", "idna"):
        package_index.add_wheel(project / "index", name, "2.0")
    texts = [(project / name).read_text() for name in LOCKS]
    make_lock(project)
    assert [(project / name).read_text() for name in LOCKS] == texts
    torch, worker, builder, _ = make_lock(project, "LOCK_FLAGS=--upgrade")
    assert torch["filelock"].version == builder["filelock"].version == "2.0"
    assert worker["idna"].version == "2.0"
