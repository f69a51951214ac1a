"""Real worker processes with the embedded model, under the local endpoint."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from local_endpoint.local import LocalEndpoint
from local_endpoint.queue import Rules
from local_endpoint.workers import Worker
from sdxl_worker.settings import EMBEDDED_MODEL_DIR

NOTHING: Mapping[str, str] = MappingProxyType({})
RULES = Rules(
    execution_timeout_min_seconds=0.5,
    ping_interval_seconds=1,
    job_lost_after_seconds=5,
    poll_seconds=5,
    run_retention_seconds=3600,
)


def real_workers(
    count: int = 1,
    *,
    stop_grace_seconds: float = 5,
    environment: Mapping[str, str] = NOTHING,
    command: Sequence[str] = (sys.executable, "handler.py"),
) -> LocalEndpoint:
    """For a `with` block."""
    return LocalEndpoint(
        worker_command=command,
        workers=count,
        rules=RULES,
        stop_grace_seconds=stop_grace_seconds,
        environment={
            "MODEL_DIR": str(EMBEDDED_MODEL_DIR),
            "OMP_NUM_THREADS": "1",
            "RUNPOD_LOG_LEVEL": "",
            **environment,
        },
    )


def came_true(condition: Callable[[], object], seconds: float) -> bool:
    """Wait until the condition holds, or return False when time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def replace(endpoint: LocalEndpoint, worker: Worker) -> None:
    """Kill a worker, as a crash of its container, and wait for its successor."""
    worker.kill()
    came_true(lambda: worker.id not in [one.id for one in endpoint.workers], 30)
    endpoint.wait_until_ready()


def written(endpoint: LocalEndpoint) -> str:
    """All that the workers have posted and logged."""
    posted = [repr(post.body) for post in list(endpoint.record.posts)]
    pinged = [repr(ping) for ping in list(endpoint.record.pings)]
    logged = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(Path(endpoint.log_dir).glob("*.log"))
    ]
    return "\n".join([*posted, *pinged, *logged])


def wants_to_be_replaced(endpoint: LocalEndpoint) -> list[str]:
    """Ids of jobs whose results told the platform to end the worker."""
    posts = list(endpoint.record.posts)
    return [post.job_id for post in posts if post.kind == "result" and post.body.get("stopPod")]


def ended(endpoint: LocalEndpoint, job_id: str, seconds: float) -> dict[str, Any]:
    """The answer about a job; where it has not ended in time, its status tells so."""
    try:
        return endpoint.wait(job_id, timeout_seconds=seconds)
    except TimeoutError:
        return {"status": f"no answer within {seconds:.0f} s"}
