"""A job, phase by phase: what waits for what."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import handler
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.outputs import answer, result
from sdxl_worker.serving import answering, fetching, job, slot
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.support import PROMPT, data_uri, error, replace_generate, run

QUICK = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 0}


def test_without_image_url_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "fetch", lambda *_: pytest.fail("fetched"))
    assert "images" in run(QUICK)


@pytest.mark.parametrize("payload", ["", "aGVsbG8="])
def test_what_is_fetched_and_is_no_picture_is_refused(payload: str) -> None:
    job_input = {"prompt": PROMPT, "image_url": f"data:image/png;base64,{payload}"}
    assert error(job_input).startswith("image_url: not a picture")


def test_a_page_in_place_of_a_picture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def page(*_: str) -> bytes:
        return b"<html>"

    monkeypatch.setattr(fetching, "fetch", page)
    job_input = {"prompt": PROMPT, "image_url": "https://example.com/page.html"}
    assert error(job_input).startswith("image_url: not a picture")


def test_no_refiner_is_told_before_the_picture_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "base").symlink_to(EMBEDDED_MODEL_DIR / "base")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    monkeypatch.setattr(fetching, "fetch", lambda *_: pytest.fail("fetched"))
    message = error({"prompt": PROMPT, "image_url": "https://example.com/a.png"})
    assert message.startswith("image_url: needs the refiner, and this model has none")


def test_while_one_picture_is_made_another_job_s_input_picture_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = generate_module.generate
    fetched = threading.Event()
    fetch = fetching.fetch

    def generate_once_fetched(*arguments: Any, **options: Any) -> Any:
        assert fetched.wait(30), "the other job waited for the GPU before it fetched its picture"
        return generate(*arguments, **options)

    async def recorded(*arguments: Any) -> Any:
        fetched.set()
        return await fetch(*arguments)

    replace_generate(monkeypatch, generate_once_fetched)
    monkeypatch.setattr(fetching, "fetch", recorded)
    image = {"image_url": data_uri(Image.new("RGB", (64, 64), "red")), "strength": 0.1}

    async def two_jobs() -> list[dict[str, Any]]:
        first = handler.handler({"id": "a", "input": QUICK})
        other = {**image, "refiner_inference_steps": 10}
        return list(await asyncio.gather(first, handler.handler({"id": "b", "input": other})))

    assert not any("error" in output for output in asyncio.run(two_jobs()))


def test_while_one_picture_is_made_an_earlier_one_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate, encode_pictures = generate_module.generate, job.encode_pictures
    encoding, second_begun = threading.Event(), threading.Event()

    def recorded(*arguments: Any, **options: Any) -> Any:
        if encoding.is_set():
            second_begun.set()
        return generate(*arguments, **options)

    def slow_encoding(*arguments: Any, **more: Any) -> Any:
        if not encoding.is_set():
            encoding.set()
            assert second_begun.wait(30), "the GPU waited for the encoding"
        return encode_pictures(*arguments, **more)

    replace_generate(monkeypatch, recorded)
    monkeypatch.setattr(job, "encode_pictures", slow_encoding)

    async def jobs_in_turn() -> list[dict[str, Any]]:
        first = asyncio.create_task(handler.handler({"id": "a", "input": QUICK}))
        while not encoding.is_set():
            await asyncio.sleep(0.01)
        return list(await asyncio.gather(first, handler.handler({"id": "b", "input": QUICK})))

    assert not any("error" in output for output in asyncio.run(jobs_in_turn()))


def test_a_job_that_is_stopped_is_encoded_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    stopped = threading.Event()
    begun = threading.Event()
    encode = answer.encode

    def slow(*arguments: Any, **options: Any) -> bytes:
        encoded.append(1)
        begun.set()
        assert stopped.wait(30)
        return encode(*arguments, **options)

    monkeypatch.setattr(answer, "encode", slow)

    async def stop() -> None:
        job_input = {**QUICK, "num_images": 3}
        answering = asyncio.create_task(handler.handler({"id": "a", "input": job_input}))
        await asyncio.to_thread(begun.wait, 60)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        stopped.set()

    asyncio.run(stop())
    assert len(encoded) == 1


def test_what_fails_beside_the_next_job_is_answered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the GPU is broken would be asked on its thread, which the next job may hold long."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    asked: list[Any] = []
    monkeypatch.setattr(result, "build_output", fail)
    monkeypatch.setattr(answering, "on_gpu_thread", lambda *_: asked.append(1))

    async def answered() -> dict[str, Any]:
        token = slot.left.set(asyncio.Event())
        try:
            return await handler.handler({"id": "a", "input": QUICK})
        finally:
            slot.left.reset(token)

    assert asyncio.run(answered())["error"].startswith("the worker failed at this job (RuntimeE")
    assert not asked
