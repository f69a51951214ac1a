"""The command as people use it: in a terminal or a pipe, against the local endpoint."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest

from client.command import main
from client.endpoint import ENDED
from local_endpoint import LocalEndpoint
from local_endpoint.server import REPOSITORY

COMMAND = (sys.executable, "-m", "client")
# Generous: the machine may be busy.
TIMEOUT_SECONDS = 120
ROWS, COLUMNS = 40, 100
# Where it does not matter what is drawn.
QUICK = ("--num-inference-steps", "2", "--refiner-inference-steps", "0")

InProcess = Callable[..., subprocess.CompletedProcess[str]]


def environment(endpoint: LocalEndpoint | None = None, **variables: str) -> dict[str, str]:
    """Without what this machine's user has set, and with an endpoint's address and key."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RUNPOD_", "SDXL_", "COLORTERM", "NO_COLOR", "FORCE_COLOR"))
    }
    address = {"SDXL_ENDPOINT": endpoint.url, "SDXL_API_KEY": endpoint.api_key} if endpoint else {}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **address, **variables}


class Terminal:
    """The command in a pseudo-terminal, and what its screen showed."""

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        env: dict[str, str],
        answers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            answers: what the terminal says when it is asked something.
        """
        self._answers = dict(answers or {})
        self.raw = ""
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.Stream(self._screen)
        self._child = pexpect.spawn(
            COMMAND[0],
            [*COMMAND[1:], *arguments],
            cwd=str(folder),
            env={"TERM": "xterm-256color", **env},
            dimensions=(ROWS, COLUMNS),
            encoding="utf-8",
            codec_errors="replace",
        )
        self.seen: list[str] = []
        """Every line that stood on the screen at some time, once."""

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def has_cursor(self) -> bool:
        return not self._screen.cursor.hidden

    def colours(self) -> set[str]:
        """Of what stands on the screen in half cells."""
        return {
            cell.fg
            for row in self._screen.buffer.values()
            for cell in row.values()
            if cell.data == "\N{UPPER HALF BLOCK}"
        }

    def wait_for(self, look: Callable[["Terminal"], Any]) -> Any:
        """What `look` finds, as soon as it finds something."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (found := look(self)):
            assert time.monotonic() < deadline, f"it did not happen: {self.text}"
            assert self._read(), f"it has ended: {self.text}"
        return found

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda terminal: text in terminal.text)

    def press(self, key: str) -> None:
        self._child.sendcontrol(key)

    def kill(self, number: int) -> None:
        self._child.kill(number)

    def end(self) -> int:
        """Read to the end and return the exit status."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self._read():
            assert time.monotonic() < deadline, f"it does not end: {self.text}"
        self._child.close()
        return int(self._child.exitstatus if self._child.exitstatus is not None else -1)

    def close(self) -> None:
        self._child.close(force=True)

    def _read(self) -> bool:
        try:
            text = self._child.read_nonblocking(4096, 0.2)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += text
        for question in [one for one in self._answers if one in self.raw]:
            self._child.send(self._answers.pop(question))
        self._stream.feed(text)
        for line in self.text.splitlines():
            if line not in self.seen:
                self.seen.append(line)
        return True


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts the command in a terminal of its own, in the test's folder."""
    started: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        started.append(Terminal(*arguments, folder=tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def sdxl(
    *arguments: str, folder: Path, env: dict[str, str], stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command with pipes in the place of a terminal."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> InProcess:
    """As `sdxl`, in the test's folder and without the start of a process."""

    def call(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        for name in os.environ.keys() - env.keys():
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        status = main(list(arguments))
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, shown.out, shown.err)

    return call


@pytest.fixture(scope="session")
def shared_endpoint() -> Iterator[LocalEndpoint]:
    """With a real worker on the miniature model."""
    with LocalEndpoint(worker_command=[sys.executable, "handler.py"]) as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(shared_endpoint: LocalEndpoint) -> Iterator[LocalEndpoint]:
    """The same, without faults that a test left, and without jobs of its own after it."""
    yield shared_endpoint
    shared_endpoint.faults.clear()
    for job in shared_endpoint.jobs:
        if job.status not in ENDED:
            shared_endpoint.call(f"cancel/{job.id}", {})


@pytest.fixture
def idle_endpoint() -> Iterator[LocalEndpoint]:
    """Without workers: jobs stay in the queue."""
    with LocalEndpoint(workers=0) as endpoint:
        yield endpoint


def jobs_since(endpoint: LocalEndpoint, before: list[Any]) -> list[Any]:
    known = {job.id for job in before}
    return [job for job in endpoint.jobs if job.id not in known]
