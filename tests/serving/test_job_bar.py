"""The bar of `python handler.py --test_input`, in a terminal and without one."""

import json
import re
import sys
import time
from pathlib import Path

import pexpect
import pyte

from tests.serving.test_command_line import QUICK, environment, handler_process
from tests.support import REPOSITORY

JOB = {"input": {**QUICK, "num_inference_steps": 200}}


def test_in_a_terminal_a_local_job_shows_its_steps_and_leaves_no_bar(tmp_path: Path) -> None:
    screen = pyte.Screen(120, 60)
    stream = pyte.Stream(screen)
    child = pexpect.spawn(
        sys.executable,
        [str(REPOSITORY / "handler.py"), "--test_input", json.dumps(JOB)],
        cwd=str(tmp_path),
        env={"TERM": "xterm", **environment()},
        dimensions=(60, 120),
        encoding="utf-8",
    )
    seen: set[str] = set()
    deadline = time.monotonic() + 120
    while child.isalive() or child.buffer:
        assert time.monotonic() < deadline
        try:
            stream.feed(child.read_nonblocking(1024, 0.2))
        except pexpect.TIMEOUT:
            continue
        except pexpect.EOF:
            break
        seen.update(line.strip() for line in screen.display)
    child.close()
    assert child.exitstatus == 0
    assert any(re.fullmatch(r"base, step \d+/200 .*\d+%, \d\d:\d\d left", line) for line in seen)
    assert any(line.startswith("loading the models, 00:0") for line in seen)
    left = [line.strip() for line in screen.display if line.strip()]
    assert not [line for line in left if " left" in line or "loading the models" in line]
    assert [line for line in left if line.startswith("Saved output/")]
    assert [line for line in left if "generate done after" in line]


def test_without_a_terminal_there_is_no_bar(tmp_path: Path) -> None:
    done = handler_process("--test_input", json.dumps({"input": QUICK}), folder=tmp_path)
    assert done.returncode == 0
    assert "step" not in done.stdout + done.stderr
    assert "loading the models" not in done.stdout + done.stderr
