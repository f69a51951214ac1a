"""What was compiled is kept, and taken only where it runs."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.ways import psnr_db
from sdxl_worker import versions
from sdxl_worker.loading import weights as weights_module
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.loading.weights import Weights
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed import compiling
from sdxl_worker.speed import optimize as optimize_module
from sdxl_worker.speed.optimize import optimizations_of, optimize
from tests import inpainting_model
from tests.support import (
    PROMPT,
    REQUESTS,
    canvas_of,
    draw,
    largest_difference,
    models,
    noise_picture,
    weights_being_read,
)

COMPILES = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="compiling for the CPU needs a C++ compiler: install g++",
)


COMPILED = """
import json, sys
import torch
from sdxl_worker.request import parse_request
from sdxl_worker.serving.start import start
from sdxl_worker.settings import Settings
from tests.support import draw

settings = Settings(model_dir=sys.argv[1], compile="blocks", compile_cache_dir=sys.argv[2])
models = start(settings).result()
[picture] = draw(parse_request(json.loads(sys.argv[3])), models)
counters = torch._dynamo.utils.counters["inductor"]
print(json.dumps({
    "pixels": picture.tobytes().hex(),
    "hits": counters["fxgraph_cache_hit"], "misses": counters["fxgraph_cache_miss"],
}))
"""


def compiled(model_dir: Path, cache: Path, inductor: Path) -> dict[str, Any]:
    """A worker's start with COMPILE=blocks, in a process of its own, and a picture."""
    job = {**REQUESTS["base"], "height": 64, "width": 64}
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(inductor)}
    finished = subprocess.run(
        [sys.executable, "-c", COMPILED, str(model_dir), str(cache), json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


@COMPILES
def test_compiled_blocks_draw_the_same_and_the_next_worker_compiles_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "base").symlink_to(EMBEDDED_MODEL_DIR / "base")
    cache = tmp_path / "cache"
    first = compiled(tmp_path / "model", cache, tmp_path / "one")
    assert len(list(cache.iterdir())) == 1
    second = compiled(tmp_path / "model", cache, tmp_path / "another")
    assert first["misses"] > 0
    assert first["hits"] == 0
    assert second["misses"] == 0
    assert second["hits"] >= first["misses"]
    assert second["pixels"] == first["pixels"]

    [plain] = draw(parse_request({**REQUESTS["base"], "height": 64, "width": 64}), models())
    picture = Image.frombytes("RGB", (64, 64), bytes.fromhex(first["pixels"]))
    assert psnr_db([picture], [plain]) > 45


@pytest.mark.parametrize("optimization", ["compile_blocks", "compile_unet"])
def test_a_compiled_unet_for_inpainting_draws_the_same(
    optimization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that stops short of C++: the rest takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    folder = inpainting_model.write(tmp_path / "model")
    plain, made = (load_models(find_model_dir(Settings(model_dir=folder))) for _ in range(2))
    optimize([optimization], made.unet)
    job = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "mask_url": "https://a.org/b"}
    request = parse_request({**job, "image_url": "https://a.org/a"})
    torch._dynamo.utils.counters.clear()
    for rows in (slice(0, 40), slice(64, 128)):
        mask = np.zeros((128, 96), bool)
        mask[rows] = True
        canvas = canvas_of(noise_picture(96, 128), mask)
        assert largest_difference(*draw(request, made, canvas), *draw(request, plain, canvas)) <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("environment", "compile_mode", "warned"),
    [
        ({"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1"}, "full", True),
        ({"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1"}, "blocks", False),
        ({}, "full", False),
        (
            {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1", "RUNPOD_INIT_TIMEOUT": "1200"},
            "full",
            False,
        ),
    ],
)
@pytest.mark.parametrize("with_cache", [False, True])
def test_a_start_that_may_take_longer_than_the_platform_waits_is_told(
    environment: dict[str, str],
    compile_mode: Any,
    warned: bool,
    with_cache: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiling, "_save", lambda _: None)
    folder = tmp_path if with_cache else None
    with kept(Settings(compile=compile_mode, compile_cache_dir=folder)):
        pass
    told = [record.message for record in caplog.records if "RUNPOD_INIT_TIMEOUT" in record.message]
    assert len(told) == warned


def test_what_an_earlier_worker_compiled_needs_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1")
    monkeypatch.setattr(compiling, "_load", lambda _: True)
    with kept(Settings(compile="full", compile_cache_dir=tmp_path)):
        pass
    assert "RUNPOD_INIT_TIMEOUT" not in caplog.text


def file_name(settings: Settings, weights: Weights) -> str:
    placement = weights.placement
    return compiling._file_name(
        optimizations_of(settings, placement), placement, weights.model_dir.configs()
    )


def kept(settings: Settings) -> contextlib.AbstractContextManager[None]:
    weights = weights_being_read()
    optimizations = optimizations_of(settings, weights.placement)
    return compiling.kept(
        settings.compile_cache_dir, optimizations, weights.placement, weights.model_dir.configs()
    )


def other_versions(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(compiling, "library_versions", lambda **_: {"torch": "2.14.0"})
    return weights_being_read()


def other_cuda(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(torch.version, "cuda", "12.6")
    return weights_being_read()


def other_processor(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    return weights_being_read()


def a_gpu(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    patch.setattr(weights_module, "_read", lambda *_: {})
    return weights_being_read("cuda")


def test_what_was_compiled_on_another_gpu_of_the_same_kind_of_cores_is_never_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H100 and H200 have the same compute capability."""
    names = []
    for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        weights = a_gpu(monkeypatch)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        names.append(file_name(Settings(compile="blocks"), weights).rpartition("-")[2])
    assert names[0] != names[1]


def test_what_was_compiled_of_quantized_networks_is_keyed_by_torchao_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(versions, "version", lambda name: "1" if name == "torchao" else "2")
        versions.library_versions.cache_clear()
        here = file_name(Settings(compile="blocks", quantize="int8"), weights_being_read())
        patch.setattr(versions, "version", lambda _: "2")
        versions.library_versions.cache_clear()
        there = file_name(Settings(compile="blocks", quantize="int8"), weights_being_read())
    versions.library_versions.cache_clear()
    assert here != there


def other_dtype(_: pytest.MonkeyPatch) -> Weights:
    return weights_being_read(dtype=torch.float16)


def other_networks(_: pytest.MonkeyPatch) -> Weights:
    weights = weights_being_read(without="refiner_unet")
    base_alone = dataclasses.replace(weights.model_dir, refiner=None)
    return dataclasses.replace(weights, model_dir=base_alone)


@pytest.mark.parametrize(
    "change",
    [other_versions, other_cuda, other_processor, a_gpu, other_dtype, other_networks],
)
def test_what_was_compiled_elsewhere_is_never_taken(
    change: Callable[[pytest.MonkeyPatch], Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = file_name(Settings(compile="blocks"), weights_being_read())
    assert here == file_name(Settings(compile="blocks"), weights_being_read())
    assert here != file_name(Settings(compile="full"), weights_being_read())
    assert here != file_name(Settings(compile="blocks"), change(monkeypatch))


def test_a_cache_that_cannot_be_read_or_written_costs_the_start_not_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"artifacts", None))
    settings = Settings(compile="blocks", compile_cache_dir=tmp_path)
    path = tmp_path / file_name(settings, weights_being_read())
    path.write_bytes(b"damaged")
    with kept(settings):
        pass
    assert "is damaged, compiling anew" in caplog.text
    assert path.read_bytes() == b"artifacts", "replaced by a whole one"
    assert list(tmp_path.iterdir()) == [path]

    (tmp_path / "file").touch()
    no_folder = Settings(compile="full", compile_cache_dir=tmp_path / "file")
    with kept(no_folder):
        pass
    assert "could not be kept" in caplog.text


def test_nothing_is_kept_where_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.compiler, "save_cache_artifacts", lambda: pytest.fail("nothing was compiled")
    )
    for settings in (Settings(compile_cache_dir=tmp_path), Settings(compile="full")):
        with kept(settings):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_was_compiled_without_it_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize_module, "check_quantization", lambda *_: None)  # fp8 needs a GPU
    kinds: list[Any] = [None, "int8", "fp8"]
    names = {
        file_name(Settings(compile="blocks", quantize=kind), weights_being_read()) for kind in kinds
    }
    assert len(names) == 3


def test_what_was_compiled_with_it_is_not_taken_for_all_that_is_compiled_without() -> None:
    def with_interval(step_cache: int | None) -> str:
        return file_name(Settings(compile="full", step_cache=step_cache), weights_being_read())

    assert with_interval(2) != with_interval(None)
    assert with_interval(2) == with_interval(3)
