"""The worker's own start without the SDK, and then two jobs, for `start_without_sdk.py`.

It logs as on the platform.

    python -m benchmarks.bare_worker '{"prompt": "a red circle"}'
"""

import json
import logging
import sys
import time
from typing import Any

from sdxl_worker.gpu import peak_memory_bytes
from sdxl_worker.request import parse_request
from sdxl_worker.serving.logs import JsonFormatter
from sdxl_worker.serving.start import start
from sdxl_worker.serving.threads import start_on_gpu_thread
from sdxl_worker.settings import load_settings

log = logging.getLogger("sdxl_worker")

READY = "ready for jobs"
JOBS = ("drew the first job", "drew the second job")


def main() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    settings = load_settings()
    models = start(settings).result()
    log.info(READY)
    request = parse_request(json.loads(sys.argv[1]))

    def draw() -> Any:
        from sdxl_worker.drawing.generate import generate
        from sdxl_worker.drawing.stages import plan_stages

        stages = plan_stages(request, models)
        return generate(request, stages, models, step_cache_interval=settings.step_cache)

    for job in JOBS:
        started = time.perf_counter()
        start_on_gpu_thread(draw).result()
        memory = {"peak_memory_mb": round(peak_memory_bytes() / 1e6)}
        log.info(job, extra={"seconds": round(time.perf_counter() - started, 2), **memory})


if __name__ == "__main__":
    main()
