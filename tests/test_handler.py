"""One job through `handler.handler`: every kind of failure, and what must not happen."""

import asyncio
import gc
import inspect
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import handler
from sdxl_worker import gpu, jobs
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.loading import models as models_module
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.support import PROMPT, data_uri, error, picture, pictures, run

QUICK = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 0}
REPOSITORY = Path(handler.__file__).parent


def test_the_handler_is_an_async_function() -> None:
    assert inspect.iscoroutinefunction(handler.handler)


def test_importing_the_handler_loads_nothing_and_starts_nothing() -> None:
    script = (
        "import sys, threading\n"
        "import handler\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'runpod'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


def test_importing_any_module_loads_no_weights_and_starts_no_thread_of_ours() -> None:
    script = (
        "import importlib, pkgutil, safetensors, threading\n"
        "import sdxl_worker\n"
        "safetensors.safe_open = None\n"
        "for module in pkgutil.iter_modules(sdxl_worker.__path__, 'sdxl_worker.'):\n"
        "    importlib.import_module(module.name)\n"
        "names = [thread.name for thread in threading.enumerate()]\n"
        "assert not any('gpu' in name for name in names), names\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


# What worker-sdxl 2.1.0 answered wrongly, and the right answer.


@pytest.mark.parametrize(
    ("job_input", "answer"),
    [
        ({"num_images": 0}, "num_images: must be an integer from 1 to 8; got 0"),
        ({"num_images": True}, "num_images: must be an integer from 1 to 8; got true"),
        ({"high_noise_frac": 2.0}, "high_noise_frac: must be a number above 0 and below 1; got 2"),
        ({"scheduler": "nope"}, "scheduler: must be one of PNDM, KLMS, DDIM"),
        ({"height": 65}, "height: must be an integer from 64 to 2048, a multiple of 8; got 65"),
        ({"height": -64}, "height: must be an integer from 64 to 2048, a multiple of 8; got -64"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be an integer from 1 to 150"),
        ({"num_inference_steps": -1}, "num_inference_steps: must be an integer from 1 to 150"),
        ({"num_inference_steps": 1001}, "num_inference_steps: must be an integer from 1 to 150"),
        ({"prompt": None}, "prompt: required, unless image_url is given; got nothing"),
        ({"image_url": "/etc/passwd"}, "image_url: must be an http:// or https:// address"),
        ({"image_url": "http://127.0.0.1/a.png"}, "image_url: the worker does not fetch this"),
        ({"foo": 1}, '"foo": no such field'),
        ({"seed": 2**64}, "seed: must be an integer from -1 to 9007199254740991"),
    ],
)
def test_bad_input_of_2_1_0_gets_a_readable_answer(job_input: dict[str, Any], answer: str) -> None:
    message = error({**QUICK, **job_input})
    assert message.startswith(answer)
    assert "Traceback" not in message
    assert "<" not in message


def test_what_2_1_0_failed_at_or_ignored_works() -> None:
    assert len(pictures(**QUICK, num_images=3)) == 3
    assert 0 <= run({**QUICK, "seed": -1})["seed"] < 2**32
    picture(**{**QUICK, "refiner_inference_steps": 1})
    picture(**QUICK, height=None)
    refined = {"image_url": data_uri(Image.new("RGB", (64, 64), "red"))}
    output = run({**refined, "prompt": PROMPT, "refiner_inference_steps": 5})
    assert list(output) == ["images", "image_url", "seed"], "no refresh_worker"


@pytest.mark.parametrize("job", [{}, {"id": "a"}, {"id": "a", "input": None}, {"input": "text"}])
def test_a_job_without_usable_input_is_answered(job: dict[str, Any]) -> None:
    output = asyncio.run(handler.handler(job))
    assert output["error"].startswith("input: must be an object")


def test_wrong_input_is_refused_before_any_model_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "load_models", lambda _: pytest.fail("loaded"))
    assert error({"prompt": PROMPT, "height": 65})


def test_no_refiner_is_told_before_the_picture_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "base").symlink_to(EMBEDDED_MODEL_DIR / "base")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    monkeypatch.setattr(jobs, "load_image", lambda _: pytest.fail("fetched"))
    message = error({"prompt": PROMPT, "image_url": "https://example.com/a.png"})
    assert message.startswith("image_url: needs the refiner, and this worker has none")


def test_a_wrong_model_dir_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_DIR", "/nowhere")
    assert error(QUICK).startswith("MODEL_DIR: /nowhere must be a folder")


def failing(with_error: BaseException) -> Any:
    def generate(*_: Any) -> None:
        raise with_error

    return generate


def test_an_unexpected_failure_is_one_string_without_its_details(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generate_module, "generate", failing(ValueError("/private/path <obj 0x1>")))
    message = error(QUICK)
    assert message == (
        "the worker failed at this job (ValueError); its log, under the job's id, says where"
    )
    [record] = [record for record in caplog.records if record.message == "failed"]
    assert vars(record)["job_id"] == "test"
    assert "/private/path" in caplog.text, "the log has the details"
    monkeypatch.undo()
    assert picture(**QUICK), "the worker is unharmed"


def test_too_little_memory_is_told_and_the_worker_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "generate", failing(torch.OutOfMemoryError("CUDA oom")))
    assert error(QUICK).startswith("not enough GPU memory for this job; ask for fewer or smaller")


def test_only_a_broken_gpu_asks_for_a_new_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "generate", failing(RuntimeError("CUDA error")))
    assert "refresh_worker" not in run(QUICK)
    monkeypatch.setattr(gpu, "gpu_is_broken", lambda: True)
    output = run(QUICK)
    assert output["refresh_worker"] is True
    assert isinstance(output["error"], str)


def test_pictures_are_made_in_one_thread_and_the_loop_stays_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []
    generate = generate_module.generate
    running, finish = threading.Event(), threading.Event()

    def recorded(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        running.set()
        assert finish.wait(30), "the loop did not come to let it go on"
        return generate(*arguments)

    monkeypatch.setattr(generate_module, "generate", recorded)

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


def test_while_one_picture_is_made_another_job_s_input_picture_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = generate_module.generate
    fetched = threading.Event()
    load_image = jobs.load_image

    def generate_once_fetched(*arguments: Any) -> Any:
        assert fetched.wait(30), "the other job waited for the GPU before it fetched its picture"
        return generate(*arguments)

    def recorded(request: Any) -> Any:
        fetched.set()
        return load_image(request)

    monkeypatch.setattr(generate_module, "generate", generate_once_fetched)
    monkeypatch.setattr(jobs, "load_image", recorded)
    image = {"image_url": data_uri(Image.new("RGB", (64, 64), "red")), "strength": 0.1}

    async def two_jobs() -> list[dict[str, Any]]:
        first = handler.handler({"id": "a", "input": QUICK})
        other = {**image, "refiner_inference_steps": 10}
        return list(await asyncio.gather(first, handler.handler({"id": "b", "input": other})))

    assert not any("error" in output for output in asyncio.run(two_jobs()))


def test_while_one_picture_is_made_an_earlier_one_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate, build_output = generate_module.generate, jobs.build_output
    encoding, second_begun = threading.Event(), threading.Event()

    def recorded(*arguments: Any) -> Any:
        if encoding.is_set():
            second_begun.set()
        return generate(*arguments)

    def slow_encoding(*arguments: Any, **more: Any) -> Any:
        if not encoding.is_set():
            encoding.set()
            assert second_begun.wait(30), "the GPU waited for the encoding"
        return build_output(*arguments, **more)

    monkeypatch.setattr(generate_module, "generate", recorded)
    monkeypatch.setattr(jobs, "build_output", slow_encoding)

    async def jobs_in_turn() -> list[dict[str, Any]]:
        first = asyncio.create_task(handler.handler({"id": "a", "input": QUICK}))
        while not encoding.is_set():
            await asyncio.sleep(0.01)
        return list(await asyncio.gather(first, handler.handler({"id": "b", "input": QUICK})))

    assert not any("error" in output for output in asyncio.run(jobs_in_turn()))


def test_prompts_and_pictures_stay_out_of_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    private = "xylophone"
    run({**QUICK, "prompt": f"a {private} " + "x " * 200, "negative_prompt": private})
    run({**QUICK, "prompt": private, "height": 65})
    run({"image_url": f"http://127.0.0.1/a.png?key={private}"})
    out, err = capfd.readouterr()
    for text in (caplog.text, out, err):
        assert private not in text
        assert "base64" not in text


def test_outputs_are_json() -> None:
    for job_input in (QUICK, {**QUICK, "height": 65}, None):
        output = run(job_input)
        assert json.loads(json.dumps(output, allow_nan=False)) == output


def test_files_are_read_ahead_before_the_libraries_are_imported() -> None:
    script = (
        "import sys\n"
        "import handler\n"
        "from sdxl_worker.settings import Settings\n"
        "ahead = []\n"
        "def read_ahead(files):\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    ahead.extend(files)\n"
        "handler.read_ahead = read_ahead\n"
        "handler._prepare(Settings())\n"
        "assert len(ahead) == 5, ahead\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


def test_garbage_is_collected_again_once_the_worker_is_ready() -> None:
    gc.disable()
    try:
        handler._prepare(Settings())
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()
