"""What a worker that serves HTTP tells Prometheus: numbers alone, no prompts and no ids.

The queue's worker has none of it, and does not import the library.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from sdxl_worker import gpu
from sdxl_worker.serving import logs
from sdxl_worker.serving.answering import Outcome
from sdxl_worker.serving.places import Places

# From a phase that takes no time to a job that the platform would no longer wait for.
BUCKETS_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 8, 12, 20, 30, 60, 120, 330)
# Of jobs that have no `Outcome`: there was no place for them.
TURNED_AWAY = "turned_away"


class Metrics:
    """Those of one server. One at a time may be told of phases: the last that was made."""

    def __init__(self, places: Places) -> None:
        disable_created_metrics()  # a time beside each number, which nobody reads
        self._registry = registry = CollectorRegistry()
        self._jobs = Counter("sdxl_jobs", "Jobs that ended.", ["outcome"], registry=registry)
        self._pictures = Counter("sdxl_pictures", "Pictures in answers.", registry=registry)
        self._stages = Histogram(
            "sdxl_stage_seconds",
            "What the stages of jobs took.",
            ["stage"],
            buckets=BUCKETS_SECONDS,
            registry=registry,
        )
        waiting = Gauge("sdxl_jobs_waiting", "Jobs that wait for their turn.", registry=registry)
        waiting.set_function(lambda: places.waiting)
        running = Gauge("sdxl_jobs_running", "Jobs that are worked at.", registry=registry)
        running.set_function(lambda: places.running)
        self._model_loaded = Gauge(
            "sdxl_model_loaded", "1 once the model has drawn, 0 before.", registry=registry
        )
        ProcessCollector(registry=registry)
        registry.register(_GpuMemory())
        for outcome in (*(one.value for one in Outcome), TURNED_AWAY):
            self._jobs.labels(outcome)  # 0 rather than nothing, before the first one
        logs.phase_listeners[:] = [self.on_stage]

    def on_job(self, outcome: str, output: dict[str, Any] | None = None) -> None:
        """
        Args:
            outcome: the value of an `Outcome`, or `TURNED_AWAY`.
        """
        self._jobs.labels(outcome).inc()
        output = output or {}
        # OpenAI's list of models has data, too.
        pictures = output.get("data" if "created" in output else "images", [])
        self._pictures.inc(len(pictures))

    def on_stage(self, stage: str, seconds: float) -> None:
        """Called in any thread.

        Args:
            stage: a phase of `logs.timed`, whose names stand in the code; "wait", for the job's
                turn; or "job", all of it.
        """
        self._stages.labels(stage).observe(seconds)

    def on_model(self) -> None:
        self._model_loaded.set(1)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _GpuMemory(Collector):
    """Asked for when it is read. There is nothing without a GPU."""

    def collect(self) -> Iterable[GaugeMetricFamily]:
        if (allocated := gpu.allocated_bytes()) is None:
            return
        yield GaugeMetricFamily(
            "sdxl_gpu_memory_allocated_bytes", "GPU memory in tensors.", allocated
        )
        yield GaugeMetricFamily(
            "sdxl_gpu_memory_peak_bytes",
            "The most since the last drawing began.",
            gpu.peak_memory_bytes(),
        )
