"""One job through `handler.handler`: every kind of failure, and what must not happen."""

import asyncio
import inspect
import json
import logging
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from PIL import Image

import handler
from sdxl_worker import gpu
from sdxl_worker.outputs import result
from sdxl_worker.serving import job
from tests.support import (
    PROMPT,
    REPOSITORY,
    data_uri,
    error,
    picture,
    pictures,
    replace_generate,
    run,
)

QUICK = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 0}


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


def test_importing_any_package_loads_no_library_of_the_models() -> None:
    script = (
        "import importlib, pkgutil, sys\n"
        "import sdxl_worker\n"
        "def packages(package):\n"
        "    yield package.__name__\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        if module.ispkg:\n"
        "            yield from packages(importlib.import_module(module.name))\n"
        "found = list(packages(sdxl_worker))\n"
        "assert len(found) > 5, found\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'runpod'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


def test_importing_any_module_loads_no_weights_and_starts_no_thread_of_ours() -> None:
    script = (
        "import importlib, pkgutil, safetensors, sys, threading\n"
        "import sdxl_worker\n"
        "safetensors.safe_open = None\n"
        "for module in pkgutil.walk_packages(sdxl_worker.__path__, 'sdxl_worker.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'sdxl_worker.serving.start' in sys.modules\n"
        "names = [thread.name for thread in threading.enumerate()]\n"
        "assert not any('gpu' in name for name in names), names\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


# What worker-sdxl 2.1.0 answered wrongly, and the right answer.


@pytest.mark.parametrize(
    ("job_input", "answer"),
    [
        ({"num_images": 0}, "num_images: must be an integer from 1 to 16; got 0"),
        ({"num_images": True}, "num_images: must be an integer from 1 to 16; got true"),
        ({"high_noise_frac": 2.0}, "high_noise_frac: must be a number from 0 to 1 (0 and 1 turn"),
        ({"scheduler": "nope"}, "scheduler: must be one of PNDM, KLMS, DDIM"),
        ({"height": 65}, "height: must be an integer from 64 to 4096, a multiple of 8; got 65"),
        ({"height": -64}, "height: must be an integer from 64 to 4096, a multiple of 8; got -64"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be an integer from 1 to 1000"),
        ({"num_inference_steps": -1}, "num_inference_steps: must be an integer from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps: must be an integer from 1 to 1000"),
        ({"prompt": None}, "prompt: required, unless image_url is given; got nothing"),
        ({"image_url": "/etc/passwd"}, "image_url: must be an http:// or https:// address"),
        ({"image_url": "http://127.0.0.1/a.png"}, "image_url: the worker connects to public"),
        ({"foo": 1}, '"foo": no such field'),
        ({"seed": 2**64}, "seed: must be an integer from -1 to 18446744073709551615"),
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
    monkeypatch.setattr(job, "ready_models", lambda _: pytest.fail("loaded"))
    assert error({"prompt": PROMPT, "height": 65})


def test_a_wrong_model_dir_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_DIR", "/nowhere")
    assert error(QUICK).startswith("MODEL_DIR: /nowhere must be a folder")


def failing(with_error: BaseException) -> Any:
    def generate(*_: Any, **__: Any) -> None:
        raise with_error

    return generate


def test_an_unexpected_failure_is_one_string_without_its_details(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace_generate(monkeypatch, failing(ValueError("/private/path <obj 0x1>")))
    message = error(QUICK)
    assert message == (
        "the worker failed at this job (ValueError); its log, under the job's id, says where"
    )
    [record] = [record for record in caplog.records if record.message == "failed"]
    assert vars(record)["job_id"] == "test"
    assert "/private/path" in caplog.text, "the log has the details"
    monkeypatch.undo()
    assert picture(**QUICK), "the worker is unharmed"


@pytest.mark.parametrize(
    "raised",
    [
        StopIteration,
        StopAsyncIteration,
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        asyncio.CancelledError,
        MemoryError,
        RecursionError,
    ],
)
def test_a_job_that_raises_anything_is_answered(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answered() -> dict[str, Any]:
        running = handler.handler({"id": "test", "input": QUICK})
        return await asyncio.wait_for(running, 30)

    def raising(*_: Any, **__: Any) -> Any:
        raise raised

    replace_generate(monkeypatch, failing(raised()))
    assert asyncio.run(answered())["error"].startswith("the worker failed at this job (")
    monkeypatch.undo()
    for module, name in [(result, "build_output"), (job, "parse_request"), (job, "load_settings")]:
        monkeypatch.setattr(module, name, raising)
        assert asyncio.run(answered())["error"].startswith("the worker failed at this job (")
        monkeypatch.undo()
    assert picture(**QUICK), "the worker is unharmed"


def test_a_failure_whose_description_fails_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_generate(monkeypatch, failing(ValueError()))
    monkeypatch.setattr(gpu, "is_broken", failing(ZeroDivisionError()))
    assert error(QUICK).startswith("the worker failed at this job (ValueError)")


def test_too_little_memory_is_told_and_the_worker_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_generate(monkeypatch, failing(torch.OutOfMemoryError("CUDA oom")))
    assert error(QUICK).startswith("not enough GPU memory for this job; ask for fewer or smaller")


def test_the_memory_of_a_failed_pass_is_free_when_the_cache_is_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def generate(*_: Any, **__: Any) -> None:
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA oom")

    replace_generate(monkeypatch, generate)
    monkeypatch.setattr(
        gpu, "free_memory", lambda: alive.extend(tensor() is not None for tensor in held)
    )
    assert error(QUICK).startswith("not enough GPU memory for this job")
    assert alive == [False]


def test_only_a_broken_gpu_asks_for_a_new_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_generate(monkeypatch, failing(RuntimeError("CUDA error")))
    assert "refresh_worker" not in run(QUICK)
    monkeypatch.setattr(gpu, "is_broken", lambda: True)
    output = run(QUICK)
    assert output["refresh_worker"] is True
    assert isinstance(output["error"], str)


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
