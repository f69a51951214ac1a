"""The Dockerfile, as far as it can be judged without building it; `make image-test` builds it."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest
from dockerfile_parse import DockerfileParser

from builder.download_weights import extras
from sdxl_worker.loading.model_dir import CONFIGS_DIR
from tests.support import REPOSITORY
from tests.tools import package_index

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


def test_the_base_image_is_python_slim_of_one_digest() -> None:
    """It stands after FROM, where Dependabot finds it."""
    base, instructions = stages()["official"]
    assert re.fullmatch(r"\S+/python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert not instructions
    assert stages()["system"][0] == "${BASE_IMAGE}"
    assert "ARG BASE_IMAGE=official\n" in DOCKERFILE


def test_all_packages_are_those_of_the_locks_with_their_hashes() -> None:
    """But for another build of torch, which the one `if` is about."""
    installs = [
        command
        for name, value in parse(DOCKERFILE)
        if name == "RUN"
        for command in re.findall(r"pip install [^&;]*", value)
    ]
    locked = [command for command in installs if "--requirement" in command]
    assert len(locked) == 5
    for command in locked:
        options = set(command.split())
        assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= options
        assert all(".lock" in place for place in re.findall(r"--requirement (\S+)", command))
    others = [command.strip() for command in installs if command not in locked]
    assert others == ['pip install --no-deps "$torch"', 'pip install "$torch"']
    checked = [value for name, value in parse(DOCKERFILE) if name == "RUN" and "pip check" in value]
    assert len(checked) == 3


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_what_makes_maps_is_installed_unless_it_is_left_out(wanted: str, tmp_path: Path) -> None:
    [script] = [value for _, value in image("none") if "requirements-control.lock;" in value]
    script = re.sub(r"^(--mount=\S+ )*", "", script)
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CONTROL_EXTRAS": wanted}
    done = subprocess.run(
        ["sh", "-ec", script], env=environment, capture_output=True, text=True, check=True
    )
    command = "install --no-deps --only-binary=:all: --require-hashes --requirement "
    expected = f"{command}requirements-control.lock" if wanted == "true" else ""
    assert done.stdout.strip() == expected
    assert "ARG CONTROL_EXTRAS=true\n" in DOCKERFILE


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """A folder with a lock; the index it was made from; one of another torch. Both have a newer
    version of what torch needs."""
    folder, usual, other = (tmp_path_factory.mktemp(name) for name in ("app", "usual", "other"))
    package_index.add_wheel(usual, "torch", "2.13.0", needs=["filelock"])
    package_index.add_wheel(usual, "filelock", "1.0")
    wheels = [*usual.rglob("*.whl")]
    (folder / "requirements-torch.lock").write_text(
        "".join(
            "{}=={} --hash=sha256:{}\n".format(
                *path.name.split("-")[:2], hashlib.sha256(path.read_bytes()).hexdigest()
            )
            for path in wheels
        )
    )
    package_index.add_wheel(usual, "filelock", "2.0")
    package_index.add_wheel(other, "torch", "2.13.0+cu126", needs=["filelock"])
    package_index.add_wheel(other, "filelock", "99.0")
    with package_index.serve(usual) as usual_url, package_index.serve(other) as other_url:
        yield folder, usual_url, other_url


def install_torch(folder: Path, target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run what the image runs, with packages installed into an environment in `target`."""
    [script] = [value for name, value in image("none") if name == "RUN" and "$torch" in value]
    script = re.sub(r"^(--mount=\S+ )*", "", script)
    venv.create(target, with_pip=True)
    environment = package_index.environment(**variables)
    environment["PATH"] = f"{target / 'bin'}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["sh", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True
    )


def installed(target: Path) -> set[str]:
    found = {path.name for path in target.glob("lib/*/site-packages/*.dist-info")}
    return {name.removesuffix(".dist-info") for name in found if name.startswith(("torch", "file"))}


def test_torch_is_installed_as_locked(indexes: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, usual, _ = indexes
    done = install_torch(folder, tmp_path, PIP_INDEX_URL=usual)
    assert done.returncode == 0, done.stderr
    assert installed(tmp_path) == {"torch-2.13.0", "filelock-1.0"}


def test_another_file_under_a_locked_version_is_refused(
    indexes: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder, _, _ = indexes
    changed = tmp_path / "index"
    package_index.add_wheel(changed, "torch", "2.13.0", needs=["filelock", "changed"])
    package_index.add_wheel(changed, "filelock", "1.0")
    with package_index.serve(changed) as url:
        done = install_torch(folder, tmp_path / "venv", PIP_INDEX_URL=url)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert installed(tmp_path / "venv") == set()


def test_from_another_index_comes_torch_alone(
    indexes: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder, usual, other = indexes
    done = install_torch(folder, tmp_path, PIP_INDEX_URL=usual, PIP_EXTRA_INDEX_URL=other)
    assert done.returncode == 0, done.stderr
    assert installed(tmp_path) == {"torch-2.13.0+cu126", "filelock-2.0"}  # and not 99.0


def test_the_command_is_one_that_the_platform_can_run() -> None:
    """Its test harness hands CMD to a shell, and knows no ENTRYPOINT; port 80 is the harness's."""
    for model in ("sdxl", "checkpoint", "shapes", "none"):
        [command] = [value for name, value in image(model) if name == "CMD"]
        assert json.loads(command) == ["sh", "/app/start.sh"]
        assert not {"ENTRYPOINT", "USER", "EXPOSE"} & {name for name, _ in image(model)}


def test_the_worker_has_a_user_of_its_own() -> None:
    """`make image-test` sees which user it is, and what this user may do."""
    [system] = [value for name, value in stages()["system"][1] if "useradd" in value]
    assert "useradd --uid 10001 --create-home --shell /usr/sbin/nologin worker" in system
    script = (REPOSITORY / "start.sh").read_text(encoding="utf-8")
    assert "setpriv --reuid=worker --regid=worker --init-groups --no-new-privs" in script
    assert 'exec $as_worker python -u /app/handler.py "$@"' in script  # process 1 gets SIGTERM
    assert subprocess.run(["sh", "-n", REPOSITORY / "start.sh"]).returncode == 0


def test_the_command_of_2_1_0_starts_the_worker_in_the_same_way(tmp_path: Path) -> None:
    """`python -u /handler.py`, which a template may still say. `make image-test` runs it, too."""
    [written] = re.findall(r"echo '(.+)' > /handler\.py", image("none")[-2][1])
    script, starts = tmp_path / "handler.py", tmp_path / "start.sh"
    script.write_text(written.replace("/app/start.sh", str(starts)), encoding="utf-8")
    starts.write_text('echo "$$" "$@"\n', encoding="utf-8")
    command = [sys.executable, "-u", str(script), "--test_input", '{"input": {"prompt": "a b"}}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told, _ = process.communicate()
    assert starts.as_posix() in script.read_text(encoding="utf-8")
    # The process is the same one: a signal to it reaches the worker.
    assert told == f'{process.pid} --test_input {{"input": {{"prompt": "a b"}}}}\n'


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        ([], {}, "--serve"),  # docker run -p 8000:8000
        ([], {"PORT": "80"}, "--serve"),
        ([], {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/"}, ""),
        (["--test_input"], {}, "--test_input"),
        (["--rp_serve_api"], {}, "--rp_serve_api"),
    ],
)
def test_without_arguments_and_without_a_queue_the_image_serves_http(
    arguments: list[str], variables: dict[str, str], told: str, tmp_path: Path
) -> None:
    """Whatever the user: here one that is not root, by the word of a program of the test's."""
    for name, program in (("id", "echo 1000"), ("python", 'shift 2; echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", REPOSITORY / "start.sh", *arguments],
        env={"PATH": path, **variables},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == (told, "")


def test_no_secret_can_stay_in_a_layer() -> None:
    for instruction, value in parse(DOCKERFILE):
        if instruction in ("ARG", "ENV", "LABEL"):
            assert not re.search("TOKEN|SECRET|PASSWORD|API_KEY", value, re.IGNORECASE), value
    for stage in ("download", "extras"):
        [download] = [value for name, value in stages()[stage][1] if name == "RUN"]
        assert "--mount=type=secret,id=hf_token" in download
        assert "HF_TOKEN_PATH=/run/secrets/hf_token" in download


def test_layers_that_change_more_often_come_later() -> None:
    layers = [f"{name} {value}" for name, value in image("sdxl") if name in ("RUN", "COPY")]

    def place(part: str) -> int:
        [found] = [i for i, layer in enumerate(layers) if part in layer]
        return found

    code = place("COPY sdxl_worker")
    order = ["apt-get", "/weights/rest", "/extras/control", "/extras/safety"]
    order += ["COPY requirements-torch.lock", "$torch"]
    order += ["COPY requirements.lock", "--requirement requirements.lock"]
    order += ["COPY requirements-control.lock", "--requirement requirements-control.lock"]
    places = [place(part) for part in order]
    assert places == sorted(places)
    assert code == len(layers) - 2
    assert "compileall" in layers[-1]


def test_code_and_requirements_do_not_download_weights_again() -> None:
    for stage in ("download", "extras"):
        copied = [value for name, value in lineage(stage, "sdxl") if name == "COPY"]
        assert copied == ["builder/requirements.lock builder/", "builder builder"]
    seen = {
        path.name
        for path in (REPOSITORY / "builder").iterdir()
        if in_context(f"builder/{path.name}")
    }
    assert seen <= {"__init__.py", "download_weights", "requirements.lock"}


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


def test_what_stands_beside_a_model_is_in_layers_of_at_most_5_5_gb() -> None:
    """As much of it as the table has, in every image."""
    sizes = dict.fromkeys(("controlnets", "ip-adapters", "safety-checker"), 0)
    for kind in extras.pinned().values():
        for entry in kind.values():
            sizes[entry["folder"].split("/")[0]] += sum(
                file["bytes"] or 0 for file in entry["files"]
            )
    assert all(0 < size < LAYER_MAX_BYTES for size in sizes.values()), sizes
    for model in ("sdxl", "checkpoint", "shapes", "none"):
        copied = [value for name, value in image(model) if name == "COPY" and "/extras" in value]
        places = ("control", "image", "safety")
        assert copied == [f"--from=extras /extras/{place} /models" for place in places]
    asked = {value for name, value in stages()["extras"][1] if name == "ARG"}
    assert asked == {"HF_ENDPOINT", "CONTROLNET", "PREPROCESSOR", "IP_ADAPTER", "SAFETY_CHECKER"}


def test_each_choice_of_weights_sets_model_dir_to_what_it_holds() -> None:
    def model_dirs(model: str) -> list[str]:
        return [value for _, value in image(model) if value.startswith("MODEL_DIR=")]

    assert model_dirs("sdxl") == model_dirs("checkpoint") == ["MODEL_DIR=/models/sdxl"]
    assert model_dirs("shapes") == ["MODEL_DIR=/models/shapes"]
    assert model_dirs("none") == []
    for model in ("sdxl", "checkpoint", "none"):
        assert not any("models/shapes" in value for _, value in image(model))
    assert "ARG MODEL=sdxl\n" in DOCKERFILE


def test_the_image_without_weights_has_what_single_files_lack() -> None:
    copies = [value for name, value in image("none") if name == "COPY"]
    assert "--from=configs /configs /models" in copies
    [run] = [value for name, value in lineage("configs", "none")[-1:] if name == "RUN"]
    assert f"--to /configs/{CONFIGS_DIR.name} --configs" in run
    assert CONFIGS_DIR.parent == Path("/models")


def test_a_checkpoint_is_converted_with_the_worker_s_libraries() -> None:
    runs = [value for name, value in lineage("download", "checkpoint") if name == "RUN"]
    assert any("--requirement requirements.lock" in value for value in runs)
    assert not any(
        "--requirement requirements.lock" in value for _, value in lineage("download", "sdxl")
    )


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
    assert "ORT_DISABLE_TELEMETRY=1" in environment
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
