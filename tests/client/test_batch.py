"""client/batch.py: `sdxl batch` with a real worker, killed and called again."""

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client.batch import JOURNAL, Journal, read_items
from client.options import UsageError, fields_of, load_schema
from local_endpoint import LocalEndpoint
from tests.client.conftest import COMMAND, QUICK, InProcess, Terminal, environment, jobs_since, sdxl

FIELDS = fields_of(load_schema())
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def pictures_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def prompts_of(jobs: list[Any]) -> list[str]:
    return sorted(job.request["input"]["prompt"] for job in jobs)


def write_prompts(folder: Path, count: int = 6) -> list[str]:
    prompts = [f"a {colour} circle" for colour in COLOURS[:count]]
    (folder / "prompts.txt").write_text("\n\n".join(prompts) + "\n")
    return prompts


def test_each_line_is_drawn_once_and_what_is_there_stays(
    endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, 3)
    before = endpoint.jobs
    arguments = ("batch", "prompts.txt", "--seed", "1", *QUICK)
    done = sdxl(*arguments, "--json", folder=tmp_path, env=environment(endpoint))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert sorted(Path(name).name for name in result["files"]) == pictures_in(tmp_path / "prompts")
    assert len(result["files"]) == 3
    assert prompts_of(jobs_since(endpoint, before)) == sorted(prompts)

    first = pictures_in(tmp_path / "prompts")[0]
    content = (tmp_path / "prompts" / first).read_bytes()
    (tmp_path / "prompts" / first).unlink()
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "a star", prompts[0]]))
    before = endpoint.jobs
    done = sdxl(*arguments, "--json", folder=tmp_path, env=environment(endpoint))
    assert json.loads(done.stdout)["there_before"] == 2
    assert "Lines that ask for the same as another one, left out: 1" in done.stderr
    assert len(jobs_since(endpoint, before)) == 2, "the new one, and the one that was removed"
    assert (tmp_path / "prompts" / first).read_bytes() == content

    (tmp_path / "prompts" / JOURNAL).unlink()
    (tmp_path / "prompts" / ".sdxl-old.part").touch()
    os.utime(tmp_path / "prompts" / ".sdxl-old.part", (0, 0))
    (tmp_path / "prompts" / ".sdxl-new.part").touch()
    before = endpoint.jobs
    sdxl(*arguments, folder=tmp_path, env=environment(endpoint))
    assert jobs_since(endpoint, before) == [], "the pictures alone tell what is done"
    assert [path.name for path in (tmp_path / "prompts").glob(".*.part")] == [".sdxl-new.part"]


def test_a_csv_and_a_jsonl_hold_whole_requests(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    lines = [
        {"prompt": "a circle", "seed": 4, "num_images": 2, "output_format": "webp"},
        {"input": {"prompt": "a star", "image": "red.png", "mode": "img2img", "seed": 5}},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with (tmp_path / "jobs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "width", "seed"), ("a\nsquare, red", 64, "")])
    before = endpoint.jobs
    for name in ("jobs.jsonl", "jobs.csv"):
        done = sdxl(
            *("batch", name, "--out", "all", "--steps", "2", "--seed", "9"),
            folder=tmp_path,
            env=environment(endpoint),
        )
        assert done.returncode == 0, done.stderr
    sent = {
        job.request["input"]["prompt"]: job.request["input"] for job in jobs_since(endpoint, before)
    }
    assert sent["a star"]["image_url"].startswith("data:image/png;base64,")
    assert sent["a star"]["seed"] == 5, "the line counts, not the option"
    assert sent["a\nsquare, red"] == {
        "prompt": "a\nsquare, red", "width": 64, "seed": 9, "num_inference_steps": 2,
    }  # fmt: skip
    names = pictures_in(tmp_path / "all")
    assert [name.rpartition("-")[2] for name in names if "circle" in name] == ["1.webp", "2.webp"]
    assert len(names) == 4


def test_killed_at_any_moment_it_goes_on_and_sends_no_job_twice(
    endpoint: LocalEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path)
    settings = ("batch", "prompts.txt", "--refiner-inference-steps", "0")
    arguments = (*COMMAND, *settings, "--jobs", "2")
    before = endpoint.jobs
    deadline = time.monotonic() + 300
    log = tmp_path / "log"
    for kill in range(1, 5):
        with log.open("ab") as file:
            running = subprocess.Popen(
                arguments, cwd=tmp_path, env=environment(endpoint), stdout=file, stderr=file
            )
        while len(jobs_since(endpoint, before)) < kill + 1 and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Not while a job is sent: nobody can know then whether it was taken.
        while '"sending"' in _last_lines(tmp_path) and running.poll() is None:
            time.sleep(0.01)
        running.kill()
        running.wait()
        for name in pictures_in(tmp_path / "prompts"):
            Image.open(tmp_path / "prompts" / name).load()  # none is there in part
    done = sdxl(*settings, folder=tmp_path, env=environment(endpoint))
    assert done.returncode == 0, done.stderr
    assert len(pictures_in(tmp_path / "prompts")) == len(prompts)
    # One that was killed while it sent says so when it goes on.
    told = (log.read_text() + done.stderr).count("may be drawn twice")
    sent = prompts_of(jobs_since(endpoint, before))
    assert set(sent) == set(prompts)
    assert len(sent) - len(prompts) <= told


def _last_lines(folder: Path) -> str:
    """Of the journal, the last line of each job."""
    lines: dict[str, str] = {}
    for line in (folder / "prompts" / JOURNAL).read_text().splitlines():
        lines[json.loads(line)["name"]] = line
    return "".join(lines.values())


def test_a_job_that_may_have_been_sent_is_told_of(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    write_prompts(tmp_path, 1)
    [item], _ = read_items("a red circle", "", {"num_inference_steps": 2}, FIELDS)
    (tmp_path / "prompts").mkdir()
    Journal(tmp_path / "prompts").note(item.name, "sending")
    done = sdxl("batch", "prompts.txt", "--steps", "2", folder=tmp_path, env=environment(endpoint))
    assert done.returncode == 0
    assert "may be drawn twice" in done.stderr


def test_what_failed_is_listed_and_tried_again(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a circle", "num_inference_steps": 2},
        {"prompt": "a star", "mask_blur": 4},
        {"prompt": "a square", "model": "nothing-of-that-name"},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for _ in range(2):
        before = endpoint.jobs
        done = sdxl("batch", "jobs.jsonl", folder=tmp_path, env=environment(endpoint))
        assert done.returncode == 1
        assert "2 of 3 failed; the same command tries them again:" in done.stderr
        listed = done.stderr.partition("tries them again:")[2]
        assert ": --mask-blur: " in listed
        assert ": --model: " in listed
        assert len(pictures_in(tmp_path / "jobs")) == 1
    assert prompts_of(jobs_since(endpoint, before)) == ["a square", "a star"]


def test_in_a_terminal_ctrl_c_cancels_all_in_flight_and_tells_how_to_go_on(
    endpoint: LocalEndpoint, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    write_prompts(tmp_path)
    before = endpoint.jobs
    arguments = ("batch", "prompts.txt", "--num-inference-steps", "1000", "--jobs", "3")
    shell = terminal(*arguments, env=environment(endpoint))
    shell.wait_for(lambda one: "/1000" in one.text and "0 of 6 done" in one.text)
    shell.wait_for(lambda one: one.text.count("in the queue") == 2)
    shell.press("c")
    assert shell.end() == 130
    assert "0 of 6 are done; the same command goes on from there." in shell.text
    assert shell.text.count("Cancelled job") == 3
    jobs = jobs_since(endpoint, before)
    assert [job.status for job in jobs] == ["CANCELLED"] * 3
    assert shell.has_cursor


def test_a_wrong_key_stops_it_at_the_first_job(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    write_prompts(tmp_path)
    began = time.monotonic()
    env = environment(endpoint, SDXL_API_KEY="another")
    done = sdxl("batch", "prompts.txt", folder=tmp_path, env=env)
    assert done.returncode == 1
    assert done.stderr.count("does not take the API key") == 1
    asked = [
        one for one in endpoint.record.exchanges if one.came_at > began and one.method == "POST"
    ]
    assert len(asked) <= 2, "those that were sent at the same time"


def test_two_at_once_in_one_folder_are_refused(
    idle_endpoint: LocalEndpoint, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    write_prompts(tmp_path)
    first = terminal("batch", "prompts.txt", env=environment(idle_endpoint))
    first.wait_for_text("in the queue")
    second = sdxl("batch", "prompts.txt", folder=tmp_path, env=environment(idle_endpoint))
    assert second.returncode == 2
    assert "another `sdxl batch` is at work in prompts" in second.stderr
    first.kill(signal.SIGTERM)
    assert first.end() == 130


# Without an endpoint.


def test_all_mistakes_are_told_before_anything_is_sent(
    tmp_path: Path, in_process: InProcess
) -> None:
    lines = ['{"prompt": "a", "width": 65}', "{", "[]", '{"prompt": "a", "sede": 1}']
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    done = in_process("batch", "jobs.jsonl", env=environment())
    assert done.returncode == 2
    told = done.stderr.splitlines()
    assert told[0].startswith("sdxl: line 1: --width: must be an integer")
    assert told[1].startswith("line 2: is not valid JSON")
    assert told[2] == "line 3: must be an input, a JSON object"
    assert told[3] == "line 4: sede: unknown field (did you mean seed?)"
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("none.txt", " \n\n", "none.txt: there is nothing to draw in it"),
        ("none.csv", "prompt,seed\n", "none.csv: there is nothing to draw in it"),
        ("long.csv", f"prompt\n{'x' * 200_000}", "line 2: cannot be read: field larger than"),
        ("deep.jsonl", "[" * 200_000, "line 1: is not valid JSON"),
    ],
)
def test_what_cannot_be_drawn_from_is_told(
    name: str, text: str, told: str, tmp_path: Path, in_process: InProcess
) -> None:
    (tmp_path / name).write_text(text)
    done = in_process("batch", name, env=environment())
    assert done.returncode == 2
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_same_input_has_the_same_name_and_another_one_another() -> None:
    def names(text: str, **base: Any) -> list[str]:
        return [item.name for item in read_items(text, ".jsonl", base, FIELDS)[0]]

    first = names('{"prompt": "a", "seed": 1}')
    assert names('{"seed": 1, "prompt": "a", "width": null}') == first
    assert names('{"prompt": "a"}', seed=1) == first
    assert names('{"prompt": "a", "seed": 2}') != first
    with pytest.raises(UsageError, match="line 2"):
        names('{"prompt": "a"}\n{"prompt": 7}')


@pytest.mark.parametrize("cut", range(1, 45, 4))
def test_a_journal_that_was_cut_off_is_read_as_far_as_it_goes(cut: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note("a", "sent", job="1")
    journal.note("b", "sent", job="2")
    content = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content[:-cut] + b"\xff\x00")
    again = Journal(tmp_path)
    assert again.last("a") == {"name": "a", "event": "sent", "job": "1"}
    assert again.last("b") == {}
    again.note("b", "done", files=[])
    assert Journal(tmp_path).last("b")["event"] == "done"
