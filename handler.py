"""Entry point: `python handler.py`, on Runpod and on a laptop.

Importing this module loads and starts nothing. `main` prepares the models; where it does not
run, as in a test, the first job prepares them.
"""

import asyncio
import os
import signal
import sys
import threading
from typing import Any

from sdxl_worker.cpu_cores import follow_the_quota
from sdxl_worker.errors import ModelError
from sdxl_worker.serving import command_line
from sdxl_worker.serving.answering import answer
from sdxl_worker.serving.command_line import Place
from sdxl_worker.serving.job_bar import loading_shown
from sdxl_worker.serving.logs import set_up_logging
from sdxl_worker.serving.orphans import leave_no_orphans
from sdxl_worker.serving.ports import open_ports
from sdxl_worker.serving.start import start
from sdxl_worker.settings import load_settings


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one job, as the SDK takes it: see `Answer.output`."""
    return (await answer(job)).output


def main() -> None:
    """Prepare the models, and take jobs: one of this machine's, HTTP's, or the queue's."""
    # The kernel drops unhandled signals to process 1, as in a container. Later the SDK, or the
    # HTTP server, handles it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    follow_the_quota()
    set_up_logging()
    leave_no_orphans()
    sys.argv[1:], place = command_line.prepare(sys.argv[1:])
    sdk_checks_done = threading.Event()

    if place is not Place.QUEUE:
        sdk_checks_done.set()  # there are none

    try:
        settings = load_settings()
        sockets = open_ports(settings) if place is Place.HTTP else []
        # The checks synchronize the GPU, which is forbidden while CUDA graphs are recorded, and
        # time a product, which would wait for whatever is drawn.
        models_start = start(settings, before_drawing=sdk_checks_done.wait)

        if place is Place.HTTP:
            from sdxl_worker.serving.http_server import serve

            serve(answer, settings, models_start, sockets)
            return

        import runpod  # takes more than a second; the models load meanwhile

        if place is not Place.QUEUE:
            with loading_shown():
                models_start.result()
    except ModelError as error:
        sys.exit(f"The worker cannot start. {error}")

    async def models_draw() -> None:
        sdk_checks_done.set()
        await asyncio.wrap_future(models_start)

    def come_after_the_sdk_checks() -> None:
        runpod.serverless.register_fitness_check(models_draw)

    # On the platform a worker whose check fails is reported unhealthy and takes no job. The SDK
    # runs checks one by one, its own after those registered before it begins. So ours is registered
    # once it has begun, and comes last: the models load while the SDK's own checks run.
    runpod.serverless.register_fitness_check(come_after_the_sdk_checks)
    if place is Place.QUEUE:
        # It imports runpod.
        from sdxl_worker.serving.scaler import take_the_place_of_the_sdks_scaler

        take_the_place_of_the_sdks_scaler()
    try:
        runpod.serverless.start(
            {
                "handler": command_line.saving(handler) if place is Place.LOCAL_JOB else handler,
                "concurrency_modifier": lambda _: settings.jobs_at_once,
            }
        )
    finally:
        sdk_checks_done.set()  # or a worker that is told to end early would wait for them for ever


if __name__ == "__main__":
    main()
