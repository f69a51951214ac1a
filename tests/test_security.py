"""What SECURITY.md promises of the source as a whole: nothing is unpickled."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import REPOSITORY

SOURCES = [
    REPOSITORY / "handler.py",
    *(
        path
        for folder in ("benchmarks", "builder", "local_endpoint", "sdxl_worker", "shapes", "tools")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ),
]
# Each reads pickles, whatever it is called with.
UNPICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NEVER = {"allow_pickle": True, "trust_remote_code": True, "use_safetensors": False}


def unpickles(source: str) -> Iterator[str]:
    """What in a module may run code that a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = f"{origin}.{alias.name}".removeprefix(".")
                if name.partition(".")[0] in UNPICKLING or name in ("torch.load", "*"):
                    yield f"line {node.lineno}: {name}"
        elif isinstance(node, ast.Call):
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            called = ast.unparse(node.func)
            safe = options.get("weights_only") == "True"
            if called in ("torch.load", "torch.serialization.load", "torch.jit.load") and not safe:
                yield f"line {node.lineno}: {called} without weights_only=True"
            for name, value in NEVER.items():
                if options.get(name, str(not value)) != str(not value):
                    yield f"line {node.lineno}: {name}={options[name]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert list(unpickles(path.read_text(encoding="utf-8"))) == []


def test_only_the_compile_cache_holds_code() -> None:
    """torch unpickles it; it is off by default, and its folder is the owner's."""
    loading = [path for path in SOURCES if "load_cache_artifacts" in path.read_text("utf-8")]
    assert loading == [REPOSITORY / "sdxl_worker" / "speed" / "compiling.py"]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=choice)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "UNet.from_pretrained(folder, use_safetensors=False)",
    ],
)
def test_unpickling_is_seen(line: str) -> None:
    assert list(unpickles(line))


@pytest.mark.parametrize("line", ["torch.load(path, weights_only=True)", "np.load(path)"])
def test_data_may_be_read(line: str) -> None:
    assert list(unpickles(line)) == []
