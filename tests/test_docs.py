"""What the documents say is what the code does."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import sdxl_worker
from builder import docs
from sdxl_worker.errors import RequestError
from sdxl_worker.request import parse_request

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_readme_s_tables_are_those_of_the_declarations() -> None:
    readme = docs.README.read_text(encoding="utf-8")
    assert docs.with_tables(readme) == readme, "run `make docs`"


def test_the_json_schema_is_that_of_the_request() -> None:
    assert docs.SCHEMA.read_text(encoding="utf-8") == docs.schema_text(), "run `make docs`"


def test_every_request_in_the_readme_is_accepted() -> None:
    readme = docs.README.read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(\{.*?\})\n```", readme, re.DOTALL)
    requests = [json.loads(block) for block in blocks if '"input"' in block]
    assert requests
    for request in requests:
        parse_request(request["input"])


def test_the_errors_in_the_readme_are_the_worker_s() -> None:
    readme = docs.README.read_text(encoding="utf-8")
    [block] = re.findall(r"```json\n(\{\s*\"error\".*?\})\n```", readme, re.DOTALL)
    with pytest.raises(RequestError) as caught:
        parse_request({"prompt": "a cat", "height": 1001, "scheduler": "EULER"})
    assert json.loads(block)["error"] == str(caught.value)


def test_the_version_is_told_once() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project["version"] == sdxl_worker.__version__
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == sdxl_worker.__version__  # type: ignore[index]


def test_requirements_are_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "builder/requirements.txt"):
        for line in (REPOSITORY / name).read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            if requirement and not requirement.startswith("-r "):
                assert re.fullmatch(r"[\w-]+==[\w.]+", requirement), requirement
    pins = (REPOSITORY / "requirements.txt").read_text()
    for pin in ("runpod==1.12.0", "diffusers==0.42.1", "transformers==5.23.0", "torch==2.13.0"):
        assert pin in pins


def test_the_worker_never_imports_the_local_endpoint() -> None:
    for path in [REPOSITORY / "handler.py", *(REPOSITORY / "sdxl_worker").glob("*.py")]:
        assert "local_endpoint" not in path.read_text(encoding="utf-8"), path.name
