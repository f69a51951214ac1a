"""The command as a package: a wheel, installed where there is nothing of the worker."""

import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from local_endpoint import LocalEndpoint
from local_endpoint.server import REPOSITORY
from tests.client.conftest import TIMEOUT_SECONDS, environment

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def needed(requirements: list[str]) -> Iterator[metadata.Distribution]:
    """What is installed here of the requirements, and of theirs."""
    waiting, known = [Requirement(one) for one in requirements], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in known or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        known.add(name)
        found = metadata.distribution(name)
        assert requirement.specifier.contains(found.version), f"{requirement}: {found.version}"
        yield found
        waiting += map(Requirement, found.requires or [])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment of its own, with what it says that it needs and nothing else.

    Its libraries are links to those of this environment: a test needs no Internet.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    subprocess.run([*pip, *build, str(REPOSITORY)], check=True, timeout=TIMEOUT_SECONDS)
    [wheel] = folder.glob("*.whl")
    python = str(folder / "bin" / "python")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
        timeout=TIMEOUT_SECONDS,
    )
    [site] = folder.glob("lib/python*/site-packages")
    for distribution in needed(PROJECT["dependencies"]):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    return folder / "bin" / "sdxl"


def run(command: Path, *arguments: str, folder: Path, env: dict[str, str]) -> str:
    env = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(command), *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_draws_outside_the_checkout_without_torch(
    installed: Path, endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    env = environment(endpoint)
    assert "draw pictures and save them" in run(installed, "--help", folder=tmp_path, env=env)
    version = run(installed, "--version", folder=tmp_path, env=env)
    assert version == f"sdxl {PROJECT['version']}\n"
    arguments = ("draw", "a red circle", "--seed", "3", "--num-inference-steps", "2")
    assert run(installed, *arguments, folder=tmp_path, env=env) == "a-red-circle-seed3.png\n"
    assert "seed: 3\n" in run(installed, "show", "a-red-circle-seed3.png", folder=tmp_path, env=env)
    for module in ("torch", "sdxl_worker", "local_endpoint"):
        code = f"import {module}"
        python = installed.with_name("python")
        assert subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True).returncode


def test_installed_it_says_where_an_endpoint_comes_from(installed: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(installed), "serve"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "run it from a checkout" in done.stderr


def test_the_pins_of_the_checkout_are_within_the_ranges() -> None:
    pins = {
        name: version
        for file in ("requirements.txt", "requirements-client.txt")
        for line in (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
        if "==" in line
        for name, _, version in [line.partition("#")[0].strip().partition("==")]
    }
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name]), text


def test_the_image_has_nothing_of_the_command() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    for name in ("textual-image", "piexif"):
        assert f"\n{name}==" not in lock
    assert "client" not in (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
