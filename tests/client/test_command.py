"""client/command.py and draw.py: `sdxl draw`, `again`, `show`, `check` with a real worker."""

import base64
import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from client import endpoint as endpoint_module
from client import picture_files
from client.command import main
from local_endpoint import LocalEndpoint
from local_endpoint.server import REPOSITORY, Options
from tests.client.conftest import QUICK, InProcess, Terminal, environment, jobs_since, sdxl

PROMPT = "a red circle on a blue background"
LONG = ("--num-inference-steps", "1000", "--num-images", "8")
# Long enough for a preview.
SHOWN = ("--num-inference-steps", "400", "--refiner-inference-steps", "0")


@pytest.fixture(scope="module")
def drawn(
    shared_endpoint: LocalEndpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("drawn")
    done = sdxl(
        *("draw", PROMPT, "--seed", "7", "--negative-prompt", "a star", *QUICK),
        folder=folder,
        env=environment(shared_endpoint),
    )
    return folder / "a-red-circle-on-a-blue-background-seed7.png", done


def test_a_prompt_becomes_a_picture_named_after_it(
    drawn: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    path, done = drawn
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path.name}\n"
    assert "Traceback" not in done.stderr
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert Image.open(path).size == (128, 128)


def test_the_file_tells_the_prompts_that_the_worker_left_out(
    drawn: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    path, _ = drawn
    told = json.loads(
        sdxl("show", str(path), "--json", folder=path.parent, env=environment()).stdout
    )
    assert told["request"]["prompt"] == PROMPT
    assert told["request"]["negative_prompt"] == "a star"
    assert told["request"]["seed"] == 7
    assert told["parameters"].startswith(f"{PROMPT}\nNegative prompt: a star\nSteps: 2, ")
    shown = sdxl("show", str(path), folder=path.parent, env=environment()).stdout
    assert f"prompt: {PROMPT}\n" in shown
    assert "seed: 7\n" in shown


def test_as_sent_the_file_is_the_worker_s_byte_for_byte(
    endpoint: LocalEndpoint,
    drawn: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    before = endpoint.jobs
    done = sdxl(
        *(
            "draw",
            PROMPT,
            "--negative-prompt",
            "a star",
            "--seed",
            "7",
            "--as-sent",
            *QUICK,
            "--out",
            "a.png",
        ),
        folder=tmp_path,
        env=environment(endpoint),
    )
    assert done.returncode == 0, done.stderr
    [job] = jobs_since(endpoint, before)
    assert (tmp_path / "a.png").read_bytes() == base64.b64decode(
        job.output["images"][0].partition(",")[2]
    )
    completed = Image.open(drawn[0])
    assert completed.tobytes() == Image.open(tmp_path / "a.png").tobytes()


def test_again_gives_the_same_file_bit_for_bit(
    endpoint: LocalEndpoint, drawn: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = sdxl("again", str(drawn[0]), folder=tmp_path, env=environment(endpoint))
    assert done.returncode == 0, done.stderr
    again = tmp_path / done.stdout.strip()
    assert again.read_bytes() == drawn[0].read_bytes()


def test_again_takes_other_settings(
    endpoint: LocalEndpoint, drawn: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = sdxl(
        "again", str(drawn[0]), "--seed", "8", "--json", folder=tmp_path, env=environment(endpoint)
    )
    result = json.loads(done.stdout)
    assert result["seed"] == 8
    assert result["files"] == ["a-red-circle-on-a-blue-background-seed8.png"]


def test_a_picture_that_came_from_another_needs_that_one_again(
    endpoint: LocalEndpoint, drawn: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    env = environment(endpoint)
    made = sdxl(
        *("draw", "a green square", "--image-url", str(drawn[0]), "--mode", "img2img"),
        *("--seed", "3", "--out", "square.jpeg", *QUICK),
        folder=tmp_path,
        env=env,
    )
    assert made.returncode == 0, made.stderr
    assert Image.open(tmp_path / "square.jpeg").format == "JPEG", "the name asks for the format"

    before = endpoint.jobs
    refused = sdxl("again", "square.jpeg", folder=tmp_path, env=env)
    assert refused.returncode == 2
    assert "--image-url: the picture was made from another one" in refused.stderr
    assert jobs_since(endpoint, before) == []

    again = sdxl("again", "square.jpeg", "--image-url", str(drawn[0]), folder=tmp_path, env=env)
    assert again.returncode == 0, again.stderr
    second = Image.open(tmp_path / again.stdout.strip())
    assert second.tobytes() == Image.open(tmp_path / "square.jpeg").tobytes()


@pytest.mark.parametrize("kept", ["secret.png", "file:///secret.png", "data:image/png;base64"])
def test_a_file_does_not_choose_pictures_of_this_machine(
    kept: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither is one sent that a file names, nor is it drawn without one that the file left out."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("secret.png")
    address = "https://example.com/a.png"
    request = {
        "prompt": "a red circle",
        "controlnet": [
            {"type": "canny", "image_url": address},
            {"type": "depth", "image_url": kept},
        ],
        "ip_adapter": [{"image_url": address, "mask_url": kept}],
    }
    told = PngInfo()
    told.add_text("request", json.dumps(request))
    Image.new("RGB", (8, 8)).save("foreign.png", pnginfo=told)
    nobody = ("--endpoint", "http://127.0.0.1:9/v2/x")  # no endpoint is asked

    assert main(["again", "foreign.png", *nobody]) == 2
    assert capsys.readouterr().err.strip() == (
        "sdxl: --controlnet[1].image_url: the picture was made from another one, which its file "
        "does not hold: give it with --controlnet once more, all of it, with image_url=FILE"
    )
    assert main(["again", "foreign.png", *nobody, "--controlnet", "canny:secret.png"]) == 2
    assert "give it with --ip-adapter once more, all of it, with mask_url=FILE" in (
        capsys.readouterr().err
    )


def test_json_is_one_document_and_nothing_else(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    done = sdxl(
        *(
            "draw",
            PROMPT,
            "--num-images",
            "2",
            "--seed",
            "5",
            "--json",
            "--out",
            "two.webp",
            *QUICK,
        ),
        folder=tmp_path,
        env=environment(endpoint),
    )
    result = json.loads(done.stdout)
    assert result["files"] == ["two-1.webp", "two-2.webp"]
    assert result["seed"] == 5
    assert result["status"] == "COMPLETED"
    assert result["id"] in {job.id for job in endpoint.jobs}
    told = [picture_files.read((tmp_path / name).read_bytes()) for name in result["files"]]
    assert [json.loads(one["request"])["seed"] for one in told] == [5, 6]


def test_json_tells_of_a_failure_too(endpoint: LocalEndpoint, in_process: InProcess) -> None:
    done = in_process("draw", "x", "--mask-blur", "4", "--json", env=environment(endpoint))
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"].startswith("--mask-blur: ")


def test_quiet_says_nothing_but_the_name(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    arguments = ("draw", PROMPT, *QUICK, "--quiet", "--out", "q.png")
    done = sdxl(*arguments, folder=tmp_path, env=environment(endpoint))
    assert (done.stdout, done.stderr) == ("q.png\n", "")


def test_what_the_worker_refuses_is_told_by_option(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    done = sdxl(
        *("draw", "x", "--mask-blur", "4", "--model", "nothing-of-that-name"),
        folder=tmp_path,
        env=environment(endpoint),
    )
    assert done.returncode == 1
    assert "sdxl: --mask-blur: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_forced(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"mine")
    env = environment(endpoint)
    done = sdxl("draw", PROMPT, *QUICK, "--out", "a.png", folder=tmp_path, env=env)
    assert done.stdout == "a-2.png\n"
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    sdxl("draw", PROMPT, *QUICK, "--out", "a.png", "--force", folder=tmp_path, env=env)
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_a_request_comes_from_a_file_or_from_stdin(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    request = {"input": {"prompt": PROMPT, "seed": 9, "steps": 2, "refiner_inference_steps": 0}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    env = environment(endpoint)
    for value, stdin in (("request.json", ""), ("-", json.dumps(request["input"]))):
        done = sdxl(
            "draw",
            "--input",
            value,
            "--seed",
            "10",
            "--json",
            folder=tmp_path,
            env=env,
            stdin=stdin,
        )
        assert json.loads(done.stdout)["seed"] == 10, done.stderr
    told = picture_files.read((tmp_path / json.loads(done.stdout)["files"][0]).read_bytes())
    assert json.loads(told["request"])["num_inference_steps"] == 2


def test_check_prints_the_report(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    done = sdxl("check", "--quiet", folder=tmp_path, env=environment(endpoint))
    assert json.loads(done.stdout)["steps"] == 3, done.stderr


# In a terminal.


def test_a_bar_shows_steps_and_the_time_left_and_goes(
    endpoint: LocalEndpoint, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    shell = terminal(
        *("draw", PROMPT, "--seed", "1", "--num-inference-steps", "250"),
        *("--refiner-inference-steps", "0"),
        env=environment(endpoint),
    )
    shell.wait_for(lambda one: any("/250" in line and " left" in line for line in one.seen))
    assert shell.end() == 0
    assert shell.text == "a-red-circle-on-a-blue-background-seed1.png", "the bar is gone"
    assert shell.has_cursor
    assert (tmp_path / shell.text).is_file()


def test_the_queue_is_told_with_the_seconds(
    idle_endpoint: LocalEndpoint, terminal: Callable[..., Terminal]
) -> None:
    shell = terminal("draw", PROMPT, env=environment(idle_endpoint))
    shell.wait_for_text("in the queue, position unknown: 2 s")
    shell.press("c")
    assert shell.end() == 130
    [job] = idle_endpoint.jobs
    assert job.status == "CANCELLED"


@pytest.mark.parametrize("signalled", ["Ctrl-C", "SIGTERM"])
def test_interrupted_it_cancels_the_job_at_the_endpoint(
    signalled: str, endpoint: LocalEndpoint, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    before = endpoint.jobs
    shell = terminal("draw", PROMPT, *LONG, env=environment(endpoint))
    shell.wait_for_text("step")
    if signalled == "Ctrl-C":
        shell.press("c")
    else:
        shell.kill(signal.SIGTERM)
    assert shell.end() == 130
    [job] = jobs_since(endpoint, before)
    assert f"Cancelled job {job.id}." in shell.text
    assert endpoint.status(job.id)["status"] == "CANCELLED"
    assert shell.has_cursor
    assert list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_ends_at_once(
    idle_endpoint: LocalEndpoint, terminal: Callable[..., Terminal]
) -> None:
    shell = terminal("draw", PROMPT, env=environment(idle_endpoint))
    shell.wait_for_text("in the queue")
    idle_endpoint.faults.delay("cancel", 600)
    shell.press("c")
    shell.wait_for_text("once more to end at once")
    shell.press("c")
    assert shell.end() == 130
    assert shell.has_cursor


def test_a_timeout_cancels_the_job(idle_endpoint: LocalEndpoint, tmp_path: Path) -> None:
    done = sdxl("draw", PROMPT, "--timeout", "1", folder=tmp_path, env=environment(idle_endpoint))
    assert done.returncode == 1
    assert "not done after 1 s (--timeout)" in done.stderr
    assert [job.status for job in idle_endpoint.jobs] == ["CANCELLED"]


def test_the_picture_so_far_is_shown_in_half_cells(
    endpoint: LocalEndpoint, terminal: Callable[..., Terminal]
) -> None:
    before = endpoint.jobs
    env = environment(endpoint, COLORTERM="truecolor")
    shell = terminal("draw", PROMPT, *SHOWN, "--seed", "1", env=env)
    assert len(shell.wait_for(lambda one: one.colours())) > 10
    assert shell.end() == 0
    assert shell.text.endswith("a-red-circle-on-a-blue-background-seed1.png")
    assert shell.colours() == set(), "the picture is gone"
    [job] = jobs_since(endpoint, before)
    assert job.request["input"]["preview"] is True


def test_a_terminal_with_sixels_gets_pixels(
    endpoint: LocalEndpoint, terminal: Callable[..., Terminal]
) -> None:
    shell = terminal(
        *("draw", PROMPT, *SHOWN, "--preview"),
        env=environment(endpoint),
        answers={"\x1b[c": "\x1b[?62;4c", "\x1b[16t": "\x1b[6;20;10t"},
    )
    assert shell.end() == 0
    assert re.search("\x1bP[0-9;]*q", shell.raw)
    assert "\N{UPPER HALF BLOCK}" not in shell.raw
    assert shell.has_cursor


def test_a_terminal_that_cannot_show_pictures_costs_nothing(
    endpoint: LocalEndpoint, terminal: Callable[..., Terminal]
) -> None:
    for arguments, variables in (((), {}), (("--no-preview",), {"COLORTERM": "truecolor"})):
        before = endpoint.jobs
        shell = terminal("draw", PROMPT, *QUICK, *arguments, env=environment(endpoint, **variables))
        assert shell.end() == 0
        [job] = jobs_since(endpoint, before)
        assert not job.request["input"].get("preview")


# Without an endpoint.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("draw", "x", "--width", "65"), "--width: must be an integer from 64 to 4096, a multiple"),
        (("draw", "x", "--steps", "many"), "--num-inference-steps: must be an integer from 1 to"),
        (("draw", "x", "--scheduler", "ddmi"), "(did you mean ddpm?)"),
        (("draw", "x", "--lora", "a:9"), "--loras[0].scale: must be a number from -5 to 5; got 9"),
        (("draw", "x", "--image", "none.png"), '--image-url: "none.png" is neither an address nor'),
        (("draw",), "nothing to draw"),
        (("draw", "x", "--widht", "64"), "sdxl: --widht: no such option (did you mean --width?)"),
        (("show", "--out=a", "x"), "sdxl: --out: no such option (see sdxl show --help)"),
        (("draw", "a", "red"), "'red' is one word too many: put several words in quotes"),
        (("draw", "x", "--timeout", "0"), "--timeout: must be a number of seconds above 0; got"),
        (("draw", "x", "--lora"), "expected one argument; see sdxl draw --help"),
        ((), "required: COMMAND; see sdxl --help"),
        (("draw", "x", "--input", '{"a":' * 100_000), "--input: is not valid JSON"),
        (("draw", "x", "--prompt", "y"), "--prompt: there is another prompt"),
        (("draw", "x", "--input", "{"), "--input: is not valid JSON"),
        (("draw", "x", "--input", '{"widht": 64}'), "widht: unknown field (did you mean width?)"),
        (("draw", "x", "--out", "a.gif"), "--out: must be a folder, or a file that ends in .png"),
        (("draw", "x", "--endpoint", "ftp://a"), "--endpoint: must be an endpoint's id"),
        (("show", "none.png"), "none.png: cannot be read: No such file or directory"),
        (("batch", "none.txt"), "none.txt: cannot be read"),
    ],
)  # fmt: skip
def test_wrong_usage_is_told_and_nothing_is_sent(
    arguments: tuple[str, ...], told: str, in_process: InProcess
) -> None:
    done = in_process(*arguments, env=environment())
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr) < 1000
    assert done.stdout == ""


def test_wrong_usage_is_told_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "x", "--json", "--widht", "64"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith("--widht: no such option")


def test_where_no_endpoint_runs_it_says_how_to_start_one(in_process: InProcess) -> None:
    env = environment(SDXL_ENDPOINT="http://127.0.0.1:9/v2/ENDPOINT_ID")
    done = in_process("draw", "x", env=env)
    assert done.returncode == 1
    assert "start the endpoint with `sdxl serve`" in done.stderr


def test_the_default_endpoint_is_that_of_make_endpoint() -> None:
    defaults = Options()
    assert f"http://127.0.0.1:8000/v2/{defaults.endpoint_id}" == endpoint_module.LOCAL_URL
    assert defaults.api_key == endpoint_module.LOCAL_KEY
    assert "PORT ?= 8000" in (REPOSITORY / "Makefile").read_text()


def test_serve_is_the_local_endpoint_with_all_its_options(tmp_path: Path) -> None:
    help_of_serve = sdxl("serve", "--help", folder=tmp_path, env=environment())
    assert help_of_serve.returncode == 0
    assert "python -m local_endpoint" in help_of_serve.stdout
    refused = sdxl("serve", "--port", "x", folder=tmp_path, env=environment())
    assert "PORT: must be an integer from 0 to 65535; got 'x'" in refused.stderr


def foreign(path: Path, **text: str) -> str:
    """A picture's file that somebody else made, with these text chunks."""
    chunks = PngInfo()
    for name, value in text.items():
        chunks.add_text(name, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return str(path)


def test_what_a_file_says_cannot_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = json.dumps({"prompt": "a\x1b[2J\x07b"})
    assert main(["show", foreign(tmp_path / "a.png", request=request)]) == 0
    assert capsys.readouterr().out == "prompt: a\ufffd[2J\ufffdb\n"


def test_a_name_that_cannot_be_printed_is_escaped(tmp_path: Path) -> None:
    foreign(tmp_path / "a.png", request=json.dumps({"prompt": "\u732b"}))
    env = environment(PYTHONIOENCODING="ascii")
    assert sdxl("show", "a.png", folder=tmp_path, env=env).stdout == "prompt: \\u732b\n"


def test_show_tells_what_other_programs_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(tmp_path / "a.png", parameters="a cat\nSteps: 5", deep="[" * 200_000)
    assert main(["show", path]) == 0
    assert "parameters: a cat\nSteps: 5\n" in capsys.readouterr().out
    assert main(["again", path]) == 2
    assert "does not tell how it was made" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["own.png", "file:///etc/passwd", "data:image/png;base64"])
def test_a_foreign_picture_does_not_choose_files_to_send(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("own.png")
    request = json.dumps({"prompt": "a", "image_url": value, "mode": "img2img"})
    assert main(["again", foreign(tmp_path / "a.png", request=request)]) == 2
    assert "give it with --image-url FILE" in capsys.readouterr().err


def test_a_foreign_picture_does_not_choose_where_pictures_go(
    endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    request = {"prompt": "a", "num_inference_steps": 1, "refiner_inference_steps": 0}
    elsewhere = {**request, "upload_urls": ["https://example.com/put"], "preview": True}
    foreign(tmp_path / "a.png", request=json.dumps(elsewhere))
    before = endpoint.jobs
    done = sdxl("again", "a.png", folder=tmp_path, env=environment(endpoint))
    assert done.returncode == 0, done.stderr
    assert [job.request["input"] for job in jobs_since(endpoint, before)] == [request]
