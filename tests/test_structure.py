"""The rules of the import graph. CONTRIBUTING says that they are held; here they are."""

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import REPOSITORY

# From the ground up: a room imports rooms that stand before it, and itself.
FLOORS = ("", "inputs", "speed", "loading", "adapters", "drawing", "outputs", "serving")
WORKER = "sdxl_worker"
USERS_OF_THE_CLIENT = ("client", "local_endpoint", "tests", "tools")
PACKAGES = ("benchmarks", "builder", "client", "local_endpoint", "shapes", "tests", "tools")


def modules(*packages: str) -> dict[str, Path]:
    """Every module below the packages, by its dotted name."""
    paths = [path for package in packages for path in (REPOSITORY / package).rglob("*.py")]
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in paths}


PROJECT = {"handler": REPOSITORY / "handler.py"} | modules(WORKER, *PACKAGES)


def imported(path: Path) -> Iterator[str]:
    """What a module imports of this project, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in PROJECT and f"{name}.__init__" not in PROJECT:
                name = name.rpartition(".")[0]
            if name:
                yield name


def room(module: str) -> str:
    """Of a module of the worker; "" for what lies beside the rooms."""
    first = [*module.split("."), ""][1]
    return first if first in FLOORS and (REPOSITORY / WORKER / first).is_dir() else ""


@functools.cache
def arrows() -> list[tuple[str, str]]:
    return [(module, target) for module, path in PROJECT.items() for target in imported(path)]


def test_the_arrows_are_read() -> None:
    assert ("handler", "sdxl_worker.serving.answering") in arrows()
    assert ("sdxl_worker.serving.job", "sdxl_worker.serving.turn") in arrows(), "also the lazy"


def test_each_room_imports_only_what_stands_below_it() -> None:
    floor = {name: i for i, name in enumerate(FLOORS)}
    upward = [
        (module, target)
        for module, target in arrows()
        if module.startswith(WORKER)
        and target.startswith(WORKER)
        and floor[room(target)] > floor[room(module)]
    ]
    assert upward == []


def test_every_folder_of_the_worker_is_a_floor() -> None:
    folders = {path.parent.name for path in (REPOSITORY / WORKER).glob("*/__init__.py")}
    assert folders == set(FLOORS) - {""}


def test_there_is_no_circle() -> None:
    targets: dict[str, set[str]] = {}
    for module, target in arrows():
        if target != module:
            targets.setdefault(module, set()).add(target)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for target in targets.get(module, ()):
                visit(target, (*way, module))
            done.add(module)

    for module in list(targets):
        visit(module, ())


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("sdxl_worker.loading", "sdxl_worker.speed"),
        ("sdxl_worker.loading", "sdxl_worker.drawing"),
        ("sdxl_worker.drawing", "sdxl_worker.serving"),
        ("sdxl_worker", "local_endpoint"),
        *(("client", other) for other in (WORKER, "handler", *PACKAGES) if other != "client"),
        *((one, "client") for one in ("handler", *PACKAGES) if one not in USERS_OF_THE_CLIENT),
        # It serves the page, which lies beside the command.
        *(("local_endpoint", f"client.{name}") for name in ("command", "endpoint", "options")),
        ("local_endpoint", "sdxl_worker"),
        ("builder", "tests"),
        *((package, "handler") for package in (WORKER, "benchmarks", "builder", "local_endpoint")),
        *((WORKER, package) for package in PACKAGES),
        *(
            (importer, target)
            for target in ("benchmarks", "tests", "tools")
            for importer in ("handler", "builder", "local_endpoint", "shapes")
        ),
        ("benchmarks", "tests"),
        ("tools", "benchmarks"),
        ("tools", "tests"),
    ],
)
def test_some_never_import_others(importer: str, target: str) -> None:
    def within(module: str, package: str) -> bool:
        return module == package or module.startswith(f"{package}.")

    assert [one for one in arrows() if within(one[0], importer) and within(one[1], target)] == []


def test_no_two_modules_share_a_name() -> None:
    # What has to have its name, for Python or for pytest, is not counted.
    names = Counter(name.rpartition(".")[2] for name in PROJECT)
    names -= Counter({"__init__": 99, "__main__": 99, "conftest": 99})
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    "module",
    [
        "handler",
        "sdxl_worker.request",
        "sdxl_worker.settings",
        "sdxl_worker.gpu",
        "sdxl_worker.placement",
        "sdxl_worker.serving.job",
        "sdxl_worker.serving.start",
        *(name for name in modules(f"{WORKER}/inputs", f"{WORKER}/outputs") if "__" not in name),
    ],
)
def test_torch_is_not_needed_to_refuse_a_job_or_to_begin_reading(module: str) -> None:
    """In a process of its own, for this one has torch already."""
    script = f"import sys, {module}; sys.exit(bool({{'torch', 'diffusers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


def test_every_package_says_what_belongs_in_it() -> None:
    for name, path in PROJECT.items():
        if name.endswith(".__init__") and not name.startswith("tests."):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_the_tests_of_a_module_are_where_the_module_is() -> None:
    """tests/ROOM/test_X.py tests X of that room, or something that its first lines name."""
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        *folders, _ = path.relative_to(REPOSITORY / "tests").parts
        places = [REPOSITORY / place for place in (WORKER, "", "client", "models")]
        assert any(place.joinpath(*folders).is_dir() for place in places), path
