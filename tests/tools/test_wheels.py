"""The recipe of benchmarks/README.md for a GPU machine without a network: it takes what is missing
there, in the versions of requirements.txt, and for that machine's Python."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tools import package_index

REPOSITORY = Path(__file__).resolve().parents[2]

# What is there, and its version where that is known.
MACHINE = {
    "torch": "2.11",
    "transformers": "5.17",
    "huggingface-hub": "1.33",
    "safetensors": "0.8",
    **dict.fromkeys(["matplotlib", "numpy", "pillow", "psutil", "regex", "requests", "scipy"], ""),
    "tqdm": "",
    # With transformers and huggingface_hub.
    **dict.fromkeys(["filelock", "packaging", "pyyaml"], ""),
}
MACHINE_PYTHON = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "extra": "",
}
# diffusers asks for it, and imports that of the standard library.
NOT_IMPORTED = {"importlib-metadata"}


def _recipe() -> str:
    readme = (REPOSITORY / "benchmarks/README.md").read_text(encoding="utf-8")
    section = readme.partition("## On a machine with a GPU and nothing else\n")[2]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0]


def _pins(words: list[str]) -> dict[str, str]:
    """Package and version, of each word that is `package==version`."""
    pins = [word.split("==") for word in words if "==" in word and not word.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def _requirements_of(package: str) -> list[Requirement]:
    """What the installed package requires on that machine."""
    requirements = map(Requirement, importlib.metadata.requires(package) or [])
    return [r for r in requirements if r.marker is None or r.marker.evaluate(MACHINE_PYTHON)]


def _imported_from(module: str) -> set[str]:
    """The names of all libraries that the module imports, sooner or later, here or further down."""
    seen: set[str] = set()
    libraries: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        top, _, below = name.partition(".")
        if not ((REPOSITORY / top).is_dir() or (REPOSITORY / f"{top}.py").is_file()):
            libraries.add(top)
            continue
        path = REPOSITORY / name.replace(".", "/")
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not source.is_file():  # a name in a module, and no module
            continue
        waiting += [name.rpartition(".")[0]] if below else []
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return libraries - set(sys.stdlib_module_names)


def _missing_there() -> set[str]:
    """What `benchmarks.pictures` imports, and what that requires, less what the machine has."""
    packages = importlib.metadata.packages_distributions()
    waiting = [packages[library][0] for library in _imported_from("benchmarks.pictures")]
    missing: set[str] = set()
    while waiting:
        package = canonicalize_name(waiting.pop())
        if package not in {*missing, *MACHINE, *NOT_IMPORTED}:
            missing.add(package)
            waiting += [requirement.name for requirement in _requirements_of(package)]
    return missing


PINS = _pins(shlex.split(_recipe()))


def test_the_recipe_takes_all_that_is_missing_there_and_nothing_else() -> None:
    assert set(PINS) == _missing_there()


def test_the_recipe_s_versions_are_those_of_requirements_txt() -> None:
    ours = _pins((REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split())
    both = PINS.keys() & ours.keys()
    assert {"diffusers", "pydantic", "torchao"} <= both
    assert {name: PINS[name] for name in both} == {name: ours[name] for name in both}


def test_the_recipe_s_pydantic_core_is_the_only_one_that_pydantic_accepts() -> None:
    [core] = [r for r in _requirements_of("pydantic") if r.name == "pydantic-core"]
    assert str(core.specifier) == f"=={PINS['pydantic-core']}"


def test_what_the_recipe_takes_is_content_with_what_is_there() -> None:
    versions = {**{name: version for name, version in MACHINE.items() if version}, **PINS}
    unmet = [
        f"{package} requires {requirement}"
        for package in PINS
        for requirement in _requirements_of(package)
        if (version := versions.get(canonicalize_name(requirement.name)))
        and not requirement.specifier.contains(version)
    ]
    assert unmet == []


def test_the_recipe_takes_wheels_for_that_machine_whatever_python_runs_it(tmp_path: Path) -> None:
    """As it stands, with the real pip, from an index that also has wheels for other machines."""
    compiled = {
        "isal": "cp312-cp312-manylinux2014_x86_64.manylinux_2_28_x86_64",
        "pydantic-core": "cp312-cp312-manylinux2014_x86_64",
        "torchao": "cp310-abi3-manylinux_2_28_x86_64",  # abi3: for newer Pythons as well
    }
    for_others = [f"cp3{minor}-cp3{minor}-manylinux2014_x86_64" for minor in (10, 11, 13, 14)]
    for_others += ["cp312-cp312-macosx_11_0_arm64", "cp312-cp312-manylinux2014_aarch64"]
    index = tmp_path / "index"
    for name, version in PINS.items():
        tags = compiled.get(name, "py3-none-any")
        # The machine has torch, so the recipe must not look for it: there is none in this index.
        package_index.add_wheel(index, name, version, tags, needs=["torch"])
        package_index.add_wheel(index, name, f"{version}.1", tags)
        for others in for_others if name in compiled else []:
            package_index.add_wheel(index, name, version, others)
    with package_index.serve(index) as url:
        environment = package_index.environment(PIP_INDEX_URL=url)
        command = ["sh", "-e", "-c", _recipe()]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    taken = {wheel.name for wheel in tmp_path.glob("wheels/*.whl")}
    assert taken == {
        f"{name.replace('-', '_')}-{version}-{compiled.get(name, 'py3-none-any')}.whl"
        for name, version in PINS.items()
    }
