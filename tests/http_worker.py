"""A worker that serves HTTP, as a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support import PROMPT, REPOSITORY

QUICK = {
    "prompt": PROMPT,
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
}
# Runs for many seconds on any machine that runs these tests, unless it is stopped.
LONG = {**QUICK, "height": 128, "width": 128, "num_inference_steps": 150, "num_images": 8}
SECONDS = 120


@dataclass(frozen=True)
class HttpWorker:
    process: "subprocess.Popen[bytes]"
    url: str
    log_file: Path
    key: str | None

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=SECONDS, trust_env=False, **options
        )

    def generate(self, **job_input: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/generate", json={"input": job_input})

    def ping(self) -> int:
        with self.client() as client:
            return client.get("/ping").status_code

    def metrics(self) -> dict[str, float]:
        """Each line's number, by what stands before it."""
        with self.client() as client:
            text = client.get("/metrics").raise_for_status().text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.listens() and self.ping() == 200)

    def listens(self) -> bool:
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(httpx.TransportError):
            return self.ping() > 0
        return False

    def exit_status(self) -> int:
        return self.process.wait(SECONDS)


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def http_worker(
    folder: Path,
    *,
    script: str = "import handler; handler.main()",
    arguments: Sequence[str] = ("--serve",),
    **environment: str,
) -> Iterator[HttpWorker]:
    """One that begins to load its models; it is killed at the end.

    Args:
        folder: for its log.
        script: what the process runs.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    port = free_port()
    log_file = folder / f"{port}.log"
    with (
        log_file.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-u", "-c", script, *arguments],
            cwd=REPOSITORY,
            env={**kept, "PORT": str(port), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        key = environment.get("API_KEY", "").split(",")[0] or None
        try:
            yield HttpWorker(process, f"http://127.0.0.1:{port}", log_file, key)
        finally:
            process.kill()
