"""Log lines: JSON on the platform, plain text elsewhere; one for each phase of a job.

No prompt, no picture and no URL's query is logged above DEBUG.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sdxl_worker.gpu import peak_memory_bytes

log = logging.getLogger("sdxl_worker")

# The SDK's level names that Python's logging does not have.
LEVELS = {"NOTSET": "CRITICAL", "TRACE": "DEBUG", "WARN": "WARNING"}
# Called in any thread as a phase ends, with its name and seconds.
phase_listeners: list[Callable[[str, float], object]] = []
EXTRAS = ("phase", "ms", "wait_ms", "peak_memory_mb", "seconds")


class JsonFormatter(logging.Formatter):
    """The form of the SDK's own lines, which Runpod's console reads, with our figures added."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "requestId": getattr(record, "job_id", None),
            "message": record.getMessage(),
            "level": record.levelname,
        }
        line |= {name: vars(record)[name] for name in EXTRAS if name in vars(record)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class PlainFormatter(logging.Formatter):
    """The form of the SDK's own lines on a laptop."""

    def format(self, record: logging.LogRecord) -> str:
        job_id = getattr(record, "job_id", None)
        text = f"{record.levelname:7}| " + (f"{job_id} | " if job_id else "") + record.getMessage()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up_logging() -> None:
    """Log to standard output at the level of RUNPOD_LOG_LEVEL, INFO if it is not set."""
    # The SDK reads the same variable: an empty one makes it crash, and its default level, DEBUG,
    # logs whole jobs.
    level = (os.environ.get("RUNPOD_LOG_LEVEL") or "INFO").upper()
    os.environ["RUNPOD_LOG_LEVEL"] = level
    handler = logging.StreamHandler(sys.stdout)
    on_platform = bool(os.environ.get("RUNPOD_ENDPOINT_ID"))
    handler.setFormatter(JsonFormatter() if on_platform else PlainFormatter())
    log.handlers = [handler]
    log.propagate = False  # runpod gives the root logger a handler, which would repeat each line
    log.setLevel(LEVELS.get(level, level))


@dataclass
class Timing:
    """Filled in when the phase ends."""

    ms: int = 0


@contextlib.contextmanager
def timed(phase: str, job_id: str | None, *, queued_at: float | None = None) -> Iterator[Timing]:
    """Log one line when the phase ends: its milliseconds, and the peak of memory so far.

    Args:
        phase: of a job: "fetch", "decode", "generate" or "encode".
        queued_at: `time.perf_counter()` when the phase began to wait for its turn.
    """
    started = time.perf_counter()
    timing = Timing()
    outcome = "ended early"
    try:
        yield timing
        outcome = "done"
    finally:
        seconds = time.perf_counter() - started
        timing.ms = ms = round(1000 * seconds)
        peak_memory_mb = round(peak_memory_bytes() / 1e6)
        extra = {"job_id": job_id, "phase": phase, "ms": ms, "peak_memory_mb": peak_memory_mb}
        text = f"{phase} {outcome} after {ms} ms, peak memory {peak_memory_mb} MB"
        if queued_at is not None:
            extra["wait_ms"] = round(1000 * (started - queued_at))
            text += f", waited {extra['wait_ms']} ms"
        log.info(text, extra=extra)
        for tell in phase_listeners:
            tell(phase, seconds)
