"""Children end with the worker that started them: real workers on the SDK, killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

from local_endpoint import LocalEndpoint, Rules
from tests.support import REPOSITORY

RULES = Rules(ping_interval_seconds=1, poll_seconds=1)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LocalEndpoint]:
    """Its own workers are killed with all they started; so here it has none."""
    with LocalEndpoint(workers=0, rules=RULES) as running:
        yield running


def eventually(look: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return found


@contextmanager
def worker_on(endpoint: LocalEndpoint, name: str) -> Iterator[list[psutil.Process]]:
    """A worker that has pinged, and the child that pings for it."""
    with subprocess.Popen(
        [sys.executable, "handler.py"],
        cwd=REPOSITORY,
        env={**endpoint.worker_environment, "RUNPOD_POD_ID": name},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            eventually(lambda: pings_of(endpoint, name), 60)
            worker = psutil.Process(process.pid)
            yield [worker, *worker.children()]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def pings_of(endpoint: LocalEndpoint, name: str) -> int:
    return sum(ping.worker_id == name for ping in list(endpoint.record.pings))


def is_gone(process: psutil.Process) -> bool:
    """An orphan is buried by process 1, if that does its work."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_the_one_that_pings_ends_with_a_killed_worker(endpoint: LocalEndpoint) -> None:
    with worker_on(endpoint, "killed") as [worker, pinger]:
        eventually(lambda: pings_of(endpoint, "killed") >= 3, 10)
        assert not is_gone(pinger), "nor does it end before"
        worker.kill()
        eventually(lambda: is_gone(pinger), 1)
        count = pings_of(endpoint, "killed")
        time.sleep(2.5)
        assert pings_of(endpoint, "killed") == count


def test_it_outlives_the_thread_that_started_it() -> None:
    """The system's own signal would end it with that thread."""
    script = """
import multiprocessing, threading, time
from sdxl_worker.serving.orphans import leave_no_orphans

leave_no_orphans()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
thread = threading.Thread(target=child.start)
thread.start()
thread.join()
time.sleep(0.5)
print(child.is_alive())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
