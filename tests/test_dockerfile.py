"""The Dockerfile, as far as it can be judged without building it; `make image-test` builds it."""

import io
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest
from dockerfile_parse import DockerfileParser

from tests.support import REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
LAYER_MAX_BYTES = 5_500_000_000
# A little more than the files have to which the table gives no size.
UNKNOWN_BYTES = {"refiner": 4_600_000_000, "vae": 350_000_000}


def parse(dockerfile: str) -> list[tuple[str, str]]:
    """Its instructions, each with its value."""
    parser = DockerfileParser(fileobj=io.BytesIO(dockerfile.encode()))
    return [
        (line["instruction"], line["value"])
        for line in parser.structure
        if line["instruction"] != "COMMENT"
    ]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """By their names: what each stage begins from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for instruction, value in parse(DOCKERFILE):
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()  # type: ignore[union-attr]
            found[name] = base, []
        elif name:
            found[name][1].append((instruction, value))
    return found


def lineage(name: str, model: str) -> list[tuple[str, str]]:
    """All instructions that a stage's image is made of, the first one first."""
    if name not in stages():
        return []
    base, own = stages()[name]
    return lineage(base.replace("${MODEL}", model), model) + own


def image(model: str) -> list[tuple[str, str]]:
    return lineage(list(stages())[-1], model)


def in_context(path: str) -> bool:
    """Whether a build sees the file: the last pattern counts that matches it or a parent."""
    seen = True
    ancestry = [path, *map(str, PurePosixPath(path).parents)]
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        for place in ancestry:
            name = place.rpartition("/")[2] if pattern.startswith("**/") else place
            is_as_deep = name.count("/") == pattern.removeprefix("**/").count("/")
            if is_as_deep and fnmatchcase(name, pattern.removeprefix("**/")):
                seen = line.startswith("!")
    return seen


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run(
        [hadolint, "--no-color", REPOSITORY / "Dockerfile"], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_the_base_image_is_python_slim_of_one_patch_version() -> None:
    assert re.search(r"^ARG BASE_IMAGE=\S+/python:3\.11\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert stages()["system"][0] == "${BASE_IMAGE}"


def test_the_command_is_one_that_the_platform_can_run() -> None:
    """Its test harness hands CMD to a shell, and knows no ENTRYPOINT; port 80 is the harness's."""
    for model in ("sdxl", "checkpoint", "shapes", "none"):
        [command] = [value for name, value in image(model) if name == "CMD"]
        assert json.loads(command) == ["python", "-u", "/app/handler.py"]
        assert not {"ENTRYPOINT", "USER", "EXPOSE"} & {name for name, _ in image(model)}


def test_no_secret_can_stay_in_a_layer() -> None:
    for instruction, value in parse(DOCKERFILE):
        if instruction in ("ARG", "ENV", "LABEL"):
            assert not re.search("TOKEN|SECRET|PASSWORD|API_KEY", value, re.IGNORECASE), value
    [download] = [value for name, value in stages()["download"][1] if name == "RUN"]
    assert "--mount=type=secret,id=hf_token" in download
    assert "HF_TOKEN_PATH=/run/secrets/hf_token" in download


def test_layers_that_change_more_often_come_later() -> None:
    layers = [f"{name} {value}" for name, value in image("sdxl") if name in ("RUN", "COPY")]

    def place(part: str) -> int:
        [found] = [i for i, layer in enumerate(layers) if part in layer]
        return found

    code = place("COPY sdxl_worker")
    order = ["apt-get", "/weights/rest", "install torch", "COPY requirements", "--requirement req"]
    places = [place(part) for part in order]
    assert places == sorted(places)
    assert code == len(layers) - 2
    assert "compileall" in layers[-1]


def test_code_and_requirements_do_not_download_weights_again() -> None:
    copied = [value for name, value in lineage("download", "sdxl") if name == "COPY"]
    assert copied == ["builder/requirements.txt builder/", "builder builder"]
    seen = {
        path.name
        for path in (REPOSITORY / "builder").iterdir()
        if in_context(f"builder/{path.name}")
    }
    assert seen <= {"__init__.py", "download_weights", "requirements.txt"}


def test_no_layer_of_weights_is_over_5_5_gb() -> None:
    """By the table of SDXL 1.0's files, where the Dockerfile moves them into folders for layers."""
    tables = sorted((REPOSITORY / "builder").glob("download_weights/sdxl.json"))
    if not tables:
        pytest.skip("the table of SDXL 1.0's files is not here yet")
    sizes: dict[str, int] = dict.fromkeys(("base-unet", "refiner", "rest"), 0)
    for name, model in json.loads(tables[0].read_text(encoding="utf-8"))["models"].items():
        for file in model["files"]:
            path = f"{model['folder']}/{file['file']}"
            is_base_unet = path.startswith("base/unet/")
            layer = "base-unet" if is_base_unet else path.split("/")[0]
            layer = layer if layer in sizes else "rest"
            sizes[layer] += UNKNOWN_BYTES[name] if file["bytes"] is None else file["bytes"]
    copied = [value for name, value in stages()["weights"][1] if name == "COPY"]
    assert copied == [f"--from=download /weights/{layer} /models/sdxl" for layer in sizes]
    assert all(0 < size < LAYER_MAX_BYTES for size in sizes.values()), sizes
    [download] = [value for name, value in stages()["download"][1] if name == "RUN"]
    assert "mv /weights/rest/base/unet /weights/base-unet/base" in download
    assert "mv /weights/rest/refiner /weights/refiner" in download


def test_each_choice_of_weights_sets_model_dir_to_what_it_holds() -> None:
    def model_dirs(model: str) -> list[str]:
        return [value for _, value in image(model) if value.startswith("MODEL_DIR=")]

    assert model_dirs("sdxl") == model_dirs("checkpoint") == ["MODEL_DIR=/models/sdxl"]
    assert model_dirs("shapes") == ["MODEL_DIR=/models/shapes"]
    assert model_dirs("none") == []
    for model in ("sdxl", "checkpoint", "none"):
        assert not any("models/shapes" in value for _, value in image(model))
    assert "ARG MODEL=sdxl\n" in DOCKERFILE


def test_a_checkpoint_is_converted_with_the_worker_s_libraries() -> None:
    installed = [value for name, value in lineage("download", "checkpoint") if name == "RUN"]
    assert any("pip install --requirement requirements.txt" in value for value in installed)
    assert not any(
        "--requirement requirements.txt" in value for _, value in lineage("download", "sdxl")
    )


def test_torch_is_the_one_of_the_requirements() -> None:
    requirements = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    [pin] = re.findall(r"^torch==\S+", requirements, re.MULTILINE)
    assert re.findall(r"torch==\S+", DOCKERFILE) == [pin]


def test_hosts_whose_driver_torch_cannot_use_are_refused_by_the_sdk_s_check() -> None:
    """The version is the lowest that the Hub is to choose; another build of torch has another."""
    environment = dict(
        pair.partition("=")[::2]
        for name, value in image("sdxl")
        if name == "ENV"
        for pair in value.split()
    )
    assert environment["RUNPOD_MIN_CUDA_VERSION"] == "${MIN_CUDA_VERSION}"
    [default] = re.findall(r"^ARG MIN_CUDA_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)
    hub = json.loads((REPOSITORY / ".runpod" / "hub.json").read_text(encoding="utf-8"))
    assert default == hub["config"]["allowedCudaVersions"][0]


def test_the_environment_is_that_of_the_platform() -> None:
    environment = " ".join(value for name, value in image("none") if name == "ENV").split()
    assert {"HF_HUB_OFFLINE=1", "RUNPOD_LOG_LEVEL=INFO", "PYTHONUNBUFFERED=1"} <= set(environment)
    assert "PATH=/opt/venv/bin:$PATH" in environment
    assert not any("HF_HUB_OFFLINE" in value for _, value in lineage("download", "sdxl"))


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".env",
        ".venv/bin/python",
        "output/output.json",
        "tests/test_dockerfile.py",
        "docs/pictures.png",
        "local_endpoint/server.py",
        "shapes/train.py",
        "tools/hub.py",
        "benchmarks/pictures.py",
        "sdxl_worker/__pycache__/gpu.cpython-311.pyc",
        "sdxl_worker/speed/__pycache__/optimize.cpython-311.pyc",
    ],
)
def test_builds_do_not_see(path: str) -> None:
    assert not in_context(path)


def test_builds_see_what_they_copy() -> None:
    copied = [value.split()[:-1] for name, value in parse(DOCKERFILE) if name == "COPY"]
    sources = {path for paths in copied for path in paths if not paths[0].startswith("--from")}
    assert "handler.py" in sources
    for path in sources - {"builder"}:
        assert in_context(path), path
    for module in (REPOSITORY / "sdxl_worker").rglob("*.py"):
        assert in_context(module.relative_to(REPOSITORY).as_posix()), module
