"""Worker processes: started as Runpod starts them, watched, and stopped with all they started."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

WATCH_SECONDS = 0.1


class EndpointError(Exception):
    """The endpoint cannot go on. The message is one line for the terminal."""


class Worker:
    """One worker process, in a process group of its own. The methods may be called from any thread.

    The SDK pings from a child process, which outlives a killed parent and would keep its jobs
    alive: on Runpod it dies with the container, here with the group.

    A worker whose endpoint is gone asks it again and again without a pause, for ever. So a guard
    process waits for the endpoint to end, in whatever way, and then ends the group.
    """

    def __init__(self, worker_id: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.id = worker_id
        self.log_path = log_path
        self.is_ending = False  # asked to end
        self.kill_at: float | None = None
        self._process = process
        # The shell reads from a pipe that nobody writes to and only this process holds open.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", f"read -r _; kill -9 -{process.pid} 2>/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it."""
        return self._process.poll()

    def terminate(self) -> None:
        """Send SIGTERM to the worker alone, as Runpod does when it scales down."""
        self.is_ending = True
        self._process.terminate()

    def kill(self) -> None:
        """End the worker and all it started at once, as a crash of its container."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        self._process.wait()

    def release(self) -> None:
        """End the guard of a worker that has ended."""
        self._guard.kill()
        self._guard.communicate()

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")


class WorkerPool:
    """The worker processes of one endpoint. Use it in one event loop.

    A worker that ends without having been asked to is replaced, unless it never was ready: then
    its successors would not be either, and `watch` raises EndpointError.
    """

    def __init__(
        self,
        command: Sequence[str],
        working_dir: Path,
        log_dir: Path,
        *,
        is_ready: Callable[[str], bool],
        gone: Callable[[str], None],
    ) -> None:
        """
        Args:
            command: what to run.
            working_dir: the folder to run it in.
            log_dir: where the workers' output goes, as `<worker id>.log`.
            is_ready: whether a worker has asked for jobs or pinged.
            gone: called with the id of each worker that has ended.
        """
        self._command = command
        self._working_dir = working_dir
        self._log_dir = log_dir
        self._is_ready = is_ready
        self._gone = gone
        self._environment: dict[str, str] = {}
        self._stop_grace_seconds = 0.0
        self._started_count = 0
        self._workers: list[Worker] = []

    @property
    def workers(self) -> list[Worker]:
        """Those that run, the oldest first."""
        return list(self._workers)

    @property
    def starting_count(self) -> int:
        return sum(not self._is_ready(worker.id) for worker in self._workers)

    def start(self, count: int, environment: Mapping[str, str], stop_grace_seconds: float) -> None:
        """Start workers.

        Args:
            count: how many.
            environment: their environment; RUNPOD_POD_ID is added, each has its own.
            stop_grace_seconds: how long they may take to end when they are asked to.

        Raises:
            EndpointError: the command cannot be run.
        """
        self._environment = dict(environment)
        self._stop_grace_seconds = stop_grace_seconds
        for _ in range(count):
            self._start_one()

    async def watch(self) -> None:
        """Replace workers that end, for ever.

        Raises:
            EndpointError: a worker ended before it was ready.
        """
        while True:
            for worker in self.workers:
                if worker.exit_status is not None:
                    self._bury(worker)
                elif worker.kill_at is not None and time.monotonic() > worker.kill_at:
                    worker.kill()
            await asyncio.sleep(WATCH_SECONDS)

    def recycle(self, worker_id: str) -> None:
        """End a worker, by force if it takes long; `watch` starts another in its place."""
        for worker in self._workers:
            if worker.id == worker_id and not worker.is_ending:
                worker.kill_at = time.monotonic() + self._stop_grace_seconds
                worker.terminate()
                worker.is_ending = False  # it has to be replaced

    async def stop(self) -> None:
        """End all workers: SIGTERM, some time to finish their jobs, then force."""
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + self._stop_grace_seconds
        while any(worker.exit_status is None for worker in self._workers):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(WATCH_SECONDS / 2)
        self.kill()

    def kill(self) -> None:
        """End all workers and what they started at once."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
            worker.release()
            self._gone(worker.id)
        self._workers.clear()

    def _start_one(self) -> None:
        self._started_count += 1
        worker_id = f"worker-{self._started_count}"
        log_path = self._log_dir / f"{worker_id}.log"
        try:
            with log_path.open("wb") as log:
                process = subprocess.Popen(
                    self._command,
                    cwd=self._working_dir,
                    env=self._environment | {"RUNPOD_POD_ID": worker_id},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise EndpointError(f"the worker cannot be started: {error}") from None
        self._workers.append(Worker(worker_id, process, log_path))

    def _bury(self, worker: Worker) -> None:
        worker.kill()  # what it started
        worker.release()
        self._workers.remove(worker)
        was_ready = self._is_ready(worker.id)
        self._gone(worker.id)
        if worker.is_ending:
            return
        if not was_ready:
            lines = worker.log().split("\n")
            last_line = next(
                (line for line in reversed(lines) if line.strip()), "(it said nothing)"
            )
            raise EndpointError(
                f"{worker.id} ended before it was ready, with exit status {worker.exit_status}; "
                f"its last line: {last_line.strip()}"
            )
        self._start_one()
