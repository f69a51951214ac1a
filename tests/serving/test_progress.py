"""What is sent while a job runs, and how a job is stopped: against a small server of the test's."""

import asyncio
import base64
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import handler
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing.preview import MAX_PREVIEW_BYTES
from sdxl_worker.drawing.steps import Step
from sdxl_worker.serving import progress as progress_module
from sdxl_worker.serving.progress import JobStopped, Progress
from tests.serving.conftest import Platform
from tests.support import PROMPT, picture, replace_generate

JOB = {"id": "job-1", "input": {}}


def step(number: int, steps: int = 50) -> Step:
    latents = torch.zeros((1, 4, 16, 16))
    return Step("base", number, steps, 100 * number // steps, lambda: latents)


async def steps_for(progress: Progress, seconds: float) -> None:
    """Calls `on_step` from another thread every 20 ms, as a GPU would."""

    def run() -> None:
        for number in range(1, round(seconds / 0.02)):
            progress.on_step(step(number, 1000))
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, run)


def test_updates_tell_stage_step_and_share(platform: Platform) -> None:
    async def job() -> None:
        async with Progress(JOB) as progress:
            await steps_for(progress, 0.5)

    asyncio.run(job())
    [(_, path, body)] = platform.updates
    assert path.startswith("/job-done/")
    assert path.endswith("/job-1?gpu=x&isStream=false")
    assert body["status"] == "IN_PROGRESS"
    progress = body["output"].pop("progress")
    assert body["output"] == {}
    assert progress == {"stage": "base", "step": progress["step"], "steps": 1000, "percent": 0}


def test_there_is_at_most_one_update_a_second_in_order(platform: Platform) -> None:
    async def job() -> None:
        async with Progress(JOB) as progress:
            await steps_for(progress, 2.6)

    asyncio.run(job())
    times = [at for at, _, _ in platform.updates]
    assert len(times) in (2, 3)
    assert all(later - earlier >= 0.95 for earlier, later in itertools.pairwise(times))
    numbers = [body["output"]["progress"]["step"] for _, _, body in platform.updates]
    assert numbers == sorted(set(numbers))


def test_no_update_comes_after_the_block_is_left(platform: Platform) -> None:
    platform.delay_seconds = 0.7

    async def job() -> float:
        async with Progress(JOB) as progress:
            await steps_for(progress, 0.2)
        return time.monotonic()

    left_at = asyncio.run(job())
    time.sleep(1.5)
    assert platform.updates, "the update under way was waited for"
    assert all(at < left_at for at, _, _ in platform.updates)


def test_a_dead_route_holds_a_result_back_for_a_bounded_time(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.delay_seconds = 3.0
    monkeypatch.setattr(progress_module, "UPDATE_TIMEOUT_SECONDS", 0.5)

    async def job() -> float:
        async with Progress(JOB) as progress:
            await steps_for(progress, 0.2)
            ended = time.monotonic()
        return time.monotonic() - ended

    assert asyncio.run(job()) < 1.0


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_failing_update_fails_no_job(platform: Platform, status: int) -> None:
    platform.status = status

    async def job() -> str:
        async with Progress(JOB) as progress:
            await steps_for(progress, 1.3)
        return "done"

    assert asyncio.run(job()) == "done"
    assert len(platform.updates) == 2, "and it goes on trying, without retries of the same"


def test_a_refused_connection_fails_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", "http://127.0.0.1:9/job-done/w/$ID?x")
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1:9/job-take/w?x")

    async def job() -> str:
        async with Progress(JOB) as progress:
            await steps_for(progress, 0.2)
        return "done"

    assert asyncio.run(job()) == "done"


def test_off_the_platform_nothing_is_sent() -> None:
    async def job() -> bool:
        async with Progress(JOB) as progress:
            await steps_for(progress, 0.1)
            return progress._task is None

    assert asyncio.run(job())


def test_a_job_that_was_left_stops_at_its_next_step() -> None:
    async def job() -> Progress:
        async with Progress(JOB) as progress:
            progress.on_step(step(1))
        return progress

    left = asyncio.run(job())
    with pytest.raises(JobStopped):
        left.on_step(step(2))


def test_a_stopped_job_leaves_the_gpu_within_a_step_and_the_next_is_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = {"prompt": PROMPT, "seed": 4, "num_inference_steps": 150}
    short = {"prompt": PROMPT, "seed": 4, "num_inference_steps": 3, "refiner_inference_steps": 0}
    expected = picture(**short)
    generate = generate_module.generate
    steps_run: list[int] = []
    ended = threading.Event()

    def recorded(
        request: Any, stages: Any, loaded: Any, image: Any, on_step: Any, **options: Any
    ) -> Any:
        def counted(one: Step) -> None:
            steps_run.append(one.step)
            on_step(one)

        try:
            return generate(request, stages, loaded, image, counted, **options)
        except JobStopped:
            ended.set()
            raise

    replace_generate(monkeypatch, recorded)

    async def stop_one() -> dict[str, Any]:
        running = asyncio.create_task(handler.handler({"id": "a", "input": long}))
        waiting = asyncio.create_task(handler.handler({"id": "b", "input": long}))
        while len(steps_run) < 3:
            await asyncio.sleep(0.005)
        running.cancel()
        waiting.cancel()
        stopped_at = len(steps_run)
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises(asyncio.CancelledError):
            await waiting
        after = await handler.handler({"id": "c", "input": short})
        assert ended.is_set()
        assert len(steps_run) - stopped_at <= 1 + 3, (
            "one step of the stopped job, three of the next"
        )
        return after

    output = asyncio.run(stop_one())
    monkeypatch.undo()
    again = picture(**{**short})
    assert again.tobytes() == expected.tobytes()
    assert output["seed"] == 4


def test_a_request_for_previews_gets_them_with_the_updates(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_UPDATES", 0.1)
    job_input = {"prompt": PROMPT, "seed": 1, "preview": True}
    output = asyncio.run(handler.handler({"id": "job-2", "input": job_input}))
    assert list(output) == ["images", "image_url", "seed"]
    assert platform.updates
    for _, _, body in platform.updates:
        uri = body["output"]["preview"]
        assert uri.startswith("data:image/jpeg;base64,")
        assert len(base64.b64decode(uri.partition(",")[2])) <= MAX_PREVIEW_BYTES


def test_downloads_tell_bytes_and_models_their_names(platform: Platform) -> None:
    async def job() -> None:
        async with Progress(JOB) as progress:
            await asyncio.sleep(0.1)
            progress.on_bytes(30, 120)
            progress.on_bytes(60, 120)
            await asyncio.sleep(1.3)
            progress.on_bytes(90, None)
            await asyncio.sleep(1.1)
            progress.on_loading("other")
            await asyncio.sleep(0.2)

    asyncio.run(job())
    assert [body["output"]["progress"] for _, _, body in platform.updates] == [
        {"stage": "download", "bytes": 30, "total_bytes": 120, "percent": 25},
        {"stage": "download", "bytes": 90, "total_bytes": None},
        {"stage": "loading", "model": "other"},
    ]


def test_a_download_that_nobody_waits_for_is_stopped() -> None:
    async def job() -> Progress:
        async with Progress(JOB) as progress:
            return progress

    with pytest.raises(JobStopped):
        asyncio.run(job()).on_bytes(1, 2)
