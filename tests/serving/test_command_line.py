"""`python handler.py` as a process: what a developer types, sees and gets back."""

import asyncio
import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_worker.serving import command_line
from sdxl_worker.serving.command_line import Place
from tests.control_networks import single
from tests.support import REPOSITORY, data_uri, decoded, noise_picture

QUICK = {
    "prompt": "a red circle",
    "seed": 5,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
}


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    return {**kept, **variables}


def handler_process(
    *arguments: str, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    return process(
        sys.executable, str(REPOSITORY / "handler.py"), *arguments, folder=folder, **variables
    )


def process(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_saved_one_picture(
    done: subprocess.CompletedProcess[str], folder: Path, seed: int
) -> Image.Image:
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = re.findall(r"^Saved (.+\.png)$", done.stdout, re.MULTILINE)
    assert path.startswith("output/")
    assert f"seed{seed}" in path
    assert "base64" not in done.stdout + done.stderr
    assert len(re.findall("generate done", done.stdout)) == 1, "each line once"
    picture = Image.open(folder / path)
    saved = json.loads((folder / "output" / "output.json").read_text())
    assert decoded(saved["output"]["image_url"]).tobytes() == picture.convert("RGB").tobytes()
    return picture


def write_job(path: Path, **job_input: Any) -> None:
    path.write_text(json.dumps({"input": {**QUICK, **job_input}}))


@pytest.mark.parametrize("arguments", [["--test_input"], []], ids=["no value", "no arguments"])
def test_the_file_in_the_folder_is_the_default_job(arguments: list[str], tmp_path: Path) -> None:
    write_job(tmp_path / "test_input.json", seed=21)
    done = handler_process(*arguments, folder=tmp_path)
    assert_saved_one_picture(done, tmp_path, seed=21)
    assert "MODEL_DIR is not set: serving the embedded miniature model" in done.stdout
    assert "Local testing complete" in done.stdout


def test_test_input_takes_a_json_string(tmp_path: Path) -> None:
    write_job(tmp_path / "test_input.json", seed=1)
    job = json.dumps({"input": {**QUICK, "seed": 22, "height": 64}})
    done = handler_process("--test_input", job, folder=tmp_path)
    assert assert_saved_one_picture(done, tmp_path, seed=22).size == (128, 64)


def test_test_input_takes_a_path_and_the_saved_result_follows_the_tutorial(tmp_path: Path) -> None:
    write_job(tmp_path / "my job.json", seed=23)
    done = handler_process("--test_input=my job.json", "--rp_log_level", "INFO", folder=tmp_path)
    picture = assert_saved_one_picture(done, tmp_path, seed=23)
    script = REPOSITORY / "tests" / "decode_image.py"
    subprocess.run([sys.executable, script], cwd=tmp_path / "output", check=True)
    again = Image.open(tmp_path / "output" / "generated_image.png")
    assert again.tobytes() == picture.tobytes()


def test_help_is_given_at_once(tmp_path: Path) -> None:
    done = handler_process("--help", folder=tmp_path, MODEL_DIR="/nowhere")
    assert done.returncode == 0, done.stderr
    for option in ("--test_input", "--rp_serve_api", "--rp_api_port", "--serve [--port N]"):
        assert option in done.stdout


@pytest.mark.parametrize("arguments", [["--prot", "9000"], ["serve"]])
def test_what_serve_does_not_know_is_refused(arguments: list[str]) -> None:
    """It would listen at another port than was meant."""
    with pytest.raises(SystemExit, match=f"{arguments[0]}: no such argument"):
        command_line.prepare(["--serve", *arguments])


def test_a_job_that_fails_exits_with_its_reason(tmp_path: Path) -> None:
    done = handler_process(
        "--test_input", '{"input": {"prompt": "a", "height": 65}}', folder=tmp_path
    )
    assert done.returncode == 1
    assert "height: must be an integer from 64 to 4096, a multiple of 8; got 65" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    answer = json.loads((tmp_path / "output" / "output.json").read_text())
    assert answer["error"].startswith("height: "), "not the one of an earlier job"


def test_control_maps_are_saved_as_pictures_are(tmp_path: Path) -> None:
    single().save_pretrained(tmp_path / "controlnets" / "own-canny")
    write_job(
        tmp_path / "test_input.json",
        controlnet=[{"type": "canny", "image_url": data_uri(noise_picture(64, 64))}],
        return_maps=True,
        num_images=2,
    )
    done = handler_process(folder=tmp_path, CONTROLNET_DIR=str(tmp_path / "controlnets"))
    assert done.returncode == 0, done.stdout
    first, _, saved = re.findall(r"^Saved (.+)$", done.stdout, re.MULTILINE)
    assert saved == f"{first.removesuffix('.png')}.map-1.png"
    output = json.loads((tmp_path / "output" / "output.json").read_text())["output"]
    assert (tmp_path / saved).read_bytes() == base64.b64decode(output["maps"][0].partition(",")[2])
    [result] = [line for line in done.stdout.splitlines() if "Job result" in line]
    assert f"'maps': ['{saved}']" in result
    assert "base64" not in done.stdout + done.stderr


def test_a_check_s_report_is_saved(tmp_path: Path) -> None:
    done = handler_process("--test_input", '{"input": {"check": true}}', folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "output" / "output.json").read_text())["output"]["steps"] == 3


def assert_not_saved(done: subprocess.CompletedProcess[str], folder: Path, reason: str) -> None:
    assert done.returncode == 1
    told = f"the pictures cannot be saved in {folder}/output: {reason}; see that it is a folder"
    assert told in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "Saved" not in done.stdout


def test_a_file_in_the_place_of_the_output_folder_is_told_and_left(tmp_path: Path) -> None:
    write_job(tmp_path / "test_input.json")
    (tmp_path / "output").write_text("mine")
    done = handler_process("--test_input", folder=tmp_path)
    assert_not_saved(done, tmp_path, "File exists")
    assert (tmp_path / "output").read_text() == "mine"


def test_where_the_room_ends_midway_no_half_file_is_left(tmp_path: Path) -> None:
    """As on a full disk; here the system ends each file at 4 kB, and a picture is larger."""
    write_job(tmp_path / "test_input.json")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "output.json").write_text("that of the job before")
    limited = f'ulimit -f 8 && exec "{sys.executable}" "{REPOSITORY / "handler.py"}" --test_input'
    done = process("sh", "-c", limited, folder=tmp_path)
    assert_not_saved(done, tmp_path, "File too large")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["output.json"]
    assert (tmp_path / "output" / "output.json").read_text() == "that of the job before"


def test_a_folder_in_which_nothing_can_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even root can make a file in /proc."""

    async def handler(_: dict[str, Any]) -> dict[str, Any]:
        return {"images": ["data:image/png;base64,aGk="], "image_url": "", "seed": 1}

    monkeypatch.chdir("/proc")

    async def answer_to_a_job() -> dict[str, Any]:
        return await command_line.saving(handler)({"id": "test", "input": {}})

    answer = asyncio.run(answer_to_a_job())
    assert list(answer) == ["error"]
    assert answer["error"].startswith("the pictures cannot be saved in /proc/output: ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--test_input", "{bad"], "--test_input: the value is not valid JSON: Expecting property"),
        (["--test_input", "gone.json"], "--test_input: gone.json cannot be read: No such file"),
        (["--test_input", "notes.txt"], "--test_input: notes.txt is not valid JSON"),
        (["--test_input", "[]"], "--test_input: a job must be an object with"),
        (["--test_input", '{"prompt": "a"}'], "--test_input: a job must be an object with"),
        (["--test_input"], "--test_input: test_input.json cannot be read: No such file"),
        ([], "--test_input: test_input.json cannot be read: No such file"),
    ],
)
def test_a_wrong_test_input_is_answered_in_one_line(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("a red circle")
    done = handler_process(*arguments, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(reason)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("MODEL_DIR", "/nowhere"), ("DTYPE", "int4"), ("PNG_METADATA", "x")]
)
def test_a_wrong_setting_stops_the_worker(name: str, value: str, tmp_path: Path) -> None:
    write_job(tmp_path / "test_input.json")
    done = handler_process(folder=tmp_path, **{name: value})
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("The worker cannot start. ")
    assert name in line
    assert value in line


def test_empty_variables_are_unset(tmp_path: Path) -> None:
    write_job(tmp_path / "test_input.json")
    names = ("MODEL_DIR", "DTYPE", "PNG_METADATA", "RUNPOD_LOG_LEVEL", "RUNPOD_REALTIME_PORT")
    done = handler_process(folder=tmp_path, **dict.fromkeys(names, ""))
    assert_saved_one_picture(done, tmp_path, seed=5)


QUEUE = {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/"}


@pytest.mark.parametrize(
    ("arguments", "variables", "place"),
    [
        ("", {}, Place.LOCAL_JOB),
        ("", QUEUE, Place.QUEUE),
        ("", {"PORT": "81"}, Place.HTTP),
        ("", {"PORT": ""}, Place.LOCAL_JOB),
        ("--port 81", {}, Place.HTTP),
        ("", QUEUE | {"PORT": "81"}, Place.QUEUE),  # also where something else sets PORT
        ("--serve", {}, Place.HTTP),
        ("--serve --port=81", QUEUE, Place.HTTP),
        ("", QUEUE | {"SERVE_HTTP": "true"}, Place.HTTP),
        ("", QUEUE | {"SERVE_HTTP": "False"}, Place.QUEUE),
        ("", QUEUE | {"SERVE_HTTP": ""}, Place.QUEUE),
        ("--test_input {}", {"PORT": "81", "SERVE_HTTP": "1"}, Place.LOCAL_JOB),
        ("--test_input {}", QUEUE, Place.LOCAL_JOB),
        ("--rp_serve_api", QUEUE | {"PORT": "81"}, Place.SERVER),
        ("", QUEUE | {"RUNPOD_REALTIME_PORT": "82"}, Place.SERVER),
    ],
    ids=str,
)
def test_the_place_that_jobs_come_from(
    arguments: str,
    variables: dict[str, str],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_job(tmp_path / "test_input.json")
    monkeypatch.chdir(tmp_path)
    given = dict.fromkeys(("PORT", "SERVE_HTTP", "RUNPOD_REALTIME_PORT", *QUEUE), "")
    for name, value in {**given, **variables}.items():
        monkeypatch.setenv(name, value)
    words = [one.replace("{}", '{"input": {}}') for one in arguments.split()]
    left, found = command_line.prepare(words)
    assert found is place
    assert not {"--serve", "--port", "81"} & set(left), "the SDK knows none of them"
    if "81" in arguments:
        assert os.environ["PORT"] == "81"
    if place is Place.HTTP:
        assert not os.environ.get("RUNPOD_WEBHOOK_GET_JOB"), "no queue is told of anything"


class TestServer:
    """`--rp_serve_api`, the SDK's own test server."""

    @pytest.fixture(scope="class")
    @staticmethod
    def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder = tmp_path_factory.mktemp("server")
        with subprocess.Popen(
            [sys.executable, REPOSITORY / "handler.py", "--rp_serve_api", f"--rp_api_port={port}"],
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as server:
            url = f"http://localhost:{port}"
            deadline = time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(url, timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, "the server ended"
                    assert time.monotonic() < deadline, "the server did not start"
                    time.sleep(0.2)
            yield url
            server.terminate()
            assert not list(folder.iterdir()), "a server saves nothing"

    def post(self, url: str, body: Any) -> Any:
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def test_runsync_returns_the_output(self, url: str) -> None:
        answer = self.post(f"{url}/runsync", {"input": QUICK})
        assert answer["status"] == "COMPLETED"
        assert list(answer["output"]) == ["images", "image_url", "seed"]
        assert decoded(answer["output"]["image_url"]).size == (128, 128)

    def test_runsync_returns_the_error(self, url: str) -> None:
        answer = self.post(f"{url}/runsync", {"input": {"height": 65}})
        assert answer["status"] == "FAILED"
        assert answer["error"].splitlines() == [
            "prompt: required, unless image_url is given; got nothing",
            "height: must be an integer from 64 to 4096, a multiple of 8; got 65",
        ]

    def test_run_and_status_return_the_output(self, url: str) -> None:
        job = self.post(f"{url}/run", {"input": QUICK})
        answer = self.post(f"{url}/status/{job['id']}", {})
        assert answer["status"] == "COMPLETED"
        assert answer["output"]["seed"] == 5
