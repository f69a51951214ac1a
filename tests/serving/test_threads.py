"""Everything of the GPU is done in one thread."""

import asyncio
import threading
from typing import Any

import pytest

import handler
from sdxl_worker.drawing import generate as generate_module
from tests.support import PROMPT, replace_generate

QUICK = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 0}


def test_pictures_are_made_in_one_thread_and_the_loop_stays_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []
    generate = generate_module.generate
    running, finish = threading.Event(), threading.Event()

    def recorded(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        running.set()
        assert finish.wait(30), "the loop did not come to let it go on"
        return generate(*arguments, **options)

    replace_generate(monkeypatch, recorded)

    async def two_jobs() -> list[dict[str, Any]]:
        jobs = [
            asyncio.create_task(handler.handler({"id": str(i), "input": QUICK})) for i in range(2)
        ]
        while not running.is_set():
            await asyncio.sleep(0.01)
        finish.set()
        return await asyncio.gather(*jobs)

    outputs = asyncio.run(two_jobs())
    assert [output.keys() for output in outputs] == [
        {"images": 0, "image_url": 0, "seed": 0}.keys()
    ] * 2
    assert outputs[0]["images"] == outputs[1]["images"]
    assert len(set(threads)) == 1
    assert threads[0].startswith("gpu")
