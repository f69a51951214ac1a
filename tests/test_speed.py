"""Fast, and the same picture: each optimization against the plain path, where a CPU can tell."""

import contextlib
import dataclasses
import itertools
import json
import math
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
from accelerate.hooks import CpuOffload
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_worker import compile_cache, cuda_graphs, memory
from sdxl_worker import generate as generate_module
from sdxl_worker import models as models_module
from sdxl_worker import weights as weights_module
from sdxl_worker.generate import generate
from sdxl_worker.gpu import StepsAhead
from sdxl_worker.memory import Plan
from sdxl_worker.model_dir import find_model_dir
from sdxl_worker.model_files import network_files
from sdxl_worker.models import Models
from sdxl_worker.optimize import MODES, STEPS, optimize, steps_of
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.weights import Placement, Weights
from tests.support import PROMPT, SCHEDULERS, largest_difference, models

JOB = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "refiner_inference_steps": 8}
REQUESTS = {
    "base": {**JOB, "refiner_inference_steps": 0},
    "refined": {**JOB, "strength": 0.5},
    "ensemble": {**JOB, "high_noise_frac": 0.5},
}


def reading(
    device: str = "cpu", dtype: torch.dtype = torch.float32, *, without: str = ""
) -> Weights:
    """The embedded model's weights, begun to be read, but for a network."""
    model_dir = find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR))
    files = network_files(model_dir, half_precision=True)
    files.pop(without, None)
    return Weights(model_dir, files, Placement(torch.device(device), dtype, resident=True))


def fresh(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Models:
    """Models of its own, which a test may change."""
    return models_module.load(reading(device, dtype))


def optimize_both(some_models: Models, steps: list[str]) -> None:
    assert some_models.refiner is not None
    optimize(steps, some_models.base.unet, some_models.base.vae)
    optimize(steps, some_models.refiner.unet)


def psnr(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.stack([np.asarray(picture, np.float64) for picture in pictures])
    error -= np.stack([np.asarray(picture) for picture in others])
    return 10 * math.log10(255**2 / max(float((error**2).mean()), 1e-9))


# --- nothing waits for the GPU -------------------------------------------------------------------


class CopiesFromHost(TorchDispatchMode):
    """Counts tensors that go from the host to the device: on a GPU each such copy waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta and "_to_copy" in str(func):
            self.count += not args[0].is_meta
        return out


@pytest.fixture(scope="module")
def on_meta() -> Models:
    """Models on the meta device, which raises at any attempt to read a number from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_module, "fit_preview_map", lambda *_: None)
        return fresh("meta", torch.float16)


@pytest.fixture
def without_memory(on_meta: Models, monkeypatch: pytest.MonkeyPatch) -> Models:
    monkeypatch.setattr(generate_module, "_to_pictures", lambda images: [tuple(images.shape)])
    return on_meta


@pytest.mark.filterwarnings("ignore:`upcast_vae`")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", REQUESTS)
def test_no_step_waits_for_the_gpu(mode: str, scheduler: str, without_memory: Models) -> None:
    """What reads from the device or copies to it makes the host wait for all steps so far."""
    request = parse_request({**REQUESTS[mode], "scheduler": scheduler})
    copies = []
    with CopiesFromHost() as from_host:
        shapes: Any = generate(
            request, without_memory, on_step=lambda _: copies.append(from_host.count)
        )
    assert shapes == [(1, 3, 128, 128)]
    # The noise of an ancestral sampler is drawn on the host, for pictures that are the same on
    # any device. Between base and refiner, a few tensors go over.
    per_step = 1 if scheduler == "K_EULER_ANCESTRAL" else 0
    increases = [after - before for before, after in itertools.pairwise(copies)]
    assert sorted(increases)[len(increases) // 2] == per_step
    assert sum(increase > per_step for increase in increases) <= (mode != "base")


def test_reading_a_number_would_have_shown(without_memory: Models) -> None:
    def read(step: generate_module.Step) -> None:
        step.latents().sum().item()

    with pytest.raises(RuntimeError, match="meta"):
        generate(parse_request(JOB), without_memory, on_step=read)


def test_the_host_is_at_most_two_steps_ahead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []
    waited: list[int] = []

    class Event:
        def record(self) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            waited.append(recorded.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    steps = StepsAhead(torch.device("cuda"))
    for _ in range(5):
        steps.limit()
    assert waited == [0, 1, 2], "after step 4, step 2 is done: 3 and 4 may be under way"
    StepsAhead(torch.device("cpu")).limit()
    assert len(recorded) == 5


# --- each step of `optimize` ---------------------------------------------------------------------


def test_every_step_of_the_modes_exists() -> None:
    assert set.union(*map(set, MODES.values())) <= set(STEPS)


@pytest.mark.parametrize("mode", [None, "graphs", "blocks", "full"])
def test_a_worker_takes_only_what_its_machine_can_do(mode: Any) -> None:
    on_cpu = Placement(torch.device("cpu"), torch.float32, resident=True)
    on_gpu = dataclasses.replace(on_cpu, device=torch.device("cuda"))
    offloaded = dataclasses.replace(on_gpu, resident=False)
    assert not {"channels_last", "cuda_graphs"} & set(steps_of(mode, on_cpu))
    assert set(steps_of(mode, on_gpu)) == MODES[mode]
    assert not {"cuda_graphs", "compile_unet"} & set(steps_of(mode, offloaded))
    assert "fuse_qkv" not in MODES[mode], "LoRA would be left out"


@pytest.mark.parametrize("mode", REQUESTS)
def test_offloaded_networks_draw_the_same_job_after_job(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from the host to the host: what is seen is that each network comes before its turn."""
    weights = reading()
    weights.placement = dataclasses.replace(weights.placement, resident=False)
    offloaded = models_module.load(weights)
    assert offloaded.refiner is not None
    came: list[Any] = []
    come = CpuOffload.pre_forward

    def noted(self: CpuOffload, module: Any, *args: Any, **kwargs: Any) -> Any:
        came.append(module)
        return come(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", noted)
    request = parse_request(REQUESTS[mode])
    for _ in range(2):
        came.clear()
        [picture] = generate(request, offloaded)
        assert largest_difference(picture, generate(request, models())[0]) == 0
        base = offloaded.base
        expected = [base.text_encoder, base.text_encoder_2, base.unet, base.vae]
        expected += [offloaded.refiner.unet] * (mode != "base")
        assert {id(module) for module in came} == {id(module) for module in expected}


@pytest.mark.parametrize("step", ["channels_last", "fuse_qkv", "cudnn_attention"])
@pytest.mark.parametrize("mode", REQUESTS)
def test_a_step_leaves_the_picture_the_same(step: str, mode: str) -> None:
    request = parse_request({**REQUESTS[mode], "num_images": 2})
    optimized = fresh()
    optimize_both(optimized, [step])
    changed = generate(request, optimized)
    assert psnr(changed, generate(request, models())) > 45


def test_steps_change_the_networks() -> None:
    """So that the comparison above is one."""
    optimized = fresh()
    optimize_both(optimized, ["channels_last", "fuse_qkv"])
    convolution = optimized.base.unet.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not models().base.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert any(name.endswith("to_qkv") for name, _ in optimized.base.unet.named_modules())


# --- CUDA graphs: recorded by a stand-in ---------------------------------------------------------


class Recording(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`: the kernels that ran, which always read from and write to
    the memory that they had. No Python code is run again."""

    def __init__(self) -> None:
        super().__init__()
        self._kernels: list[tuple[Any, Any, Any, Any]] = []
        self.replayed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._kernels.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, out in self._kernels:
            for place, value in zip(
                tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """All that is recorded during a test."""
    made: list[Recording] = []

    class Stream:
        def wait_stream(self, other: "Stream") -> None:
            pass

    @contextlib.contextmanager
    def record(graph: Recording, _pool: object, _stream: Stream, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local", "other threads bring weights meanwhile"
        made.append(graph)
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda_graphs, "_stream_and_memory", lambda: (Stream(), object()))
    return made


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_replayed_graphs_make_the_same_picture(scheduler: str, recordings: list[Recording]) -> None:
    """PNDM, without guidance, remembers outputs that the next replay overwrites."""
    graphed = fresh()
    optimize_both(graphed, ["cuda_graphs"])
    for guidance_scale in (7.5, 1.0):
        request = parse_request(
            {**REQUESTS["refined"], "scheduler": scheduler, "guidance_scale": guidance_scale}
        )
        [picture] = generate(request, graphed)
        assert largest_difference(picture, generate(request, models())[0]) == 0
    assert len(recordings) == 4, "base and refiner, with and without guidance"
    assert sum(recording.replayed for recording in recordings) > 12


def test_each_shape_is_recorded_once_and_the_least_used_is_forgotten(
    recordings: list[Recording],
) -> None:
    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (2 * sample,)

    graphed = cuda_graphs.GraphedForward(forward, torch.device("cpu"))

    def call(size: int) -> torch.Tensor:
        added = {"text_embeds": torch.ones(1), "time_ids": torch.ones(1)}
        return graphed(
            torch.ones(size),
            torch.ones(()),
            torch.ones(1),
            added_cond_kwargs=added,
            timestep_cond=None,
            return_dict=False,
        )[0]

    for size in (1, 2, 1, 2):
        assert call(size).tolist() == [2] * size
    assert len(recordings) == 2
    for size in range(3, 3 + cuda_graphs.MAX_SHAPES):
        call(size)
    call(1)
    assert len(recordings) == 2 + cuda_graphs.MAX_SHAPES + 1


# --- batches that fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", REQUESTS)
def test_pictures_are_the_same_in_batches_that_fit(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = parse_request({**REQUESTS[mode], "num_images": 5})
    together = generate(request, models())
    batches: list[int] = []
    monkeypatch.setattr(
        memory, "plan", lambda *_, **__: Plan(batch_size=2, slicing=True, tiling=False)
    )
    steps: list[generate_module.Step] = []

    def on_step(step: generate_module.Step) -> None:
        steps.append(step)
        batches.append(step.latents().shape[0])

    apart = generate(request, models(), on_step=on_step)
    assert len(apart) == 5
    for one, other in zip(apart, together, strict=True):
        assert largest_difference(one, other) <= 1
    assert set(batches) == {1, 2}
    percents = [step.percent for step in steps]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert percents[len(percents) // 2] < 70


def plan_on_gpu(
    free_bytes: float,
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_images: int,
    pixels: int,
    decoder_dtype: torch.dtype = torch.float16,
) -> Plan:
    """What is planned in float16 for a GPU with so much to spare."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_bytes) - 100, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 400)
    return memory.plan(
        torch.device("cuda"),
        torch.float16,
        num_images=num_images,
        pixels=pixels,
        decoder_dtype=decoder_dtype,
    )


MEGAPIXEL = 1024 * 1024


@pytest.mark.parametrize(
    ("free_gb", "num_images", "pixels", "expected"),
    [
        (120, 8, MEGAPIXEL, Plan(8, slicing=False, tiling=False)),
        (12, 8, MEGAPIXEL, Plan(8, slicing=True, tiling=False)),
        (12, 1, MEGAPIXEL, Plan(1, slicing=False, tiling=False)),
        (12, 8, 4 * MEGAPIXEL, Plan(6, slicing=True, tiling=False)),
        (6, 1, 4 * MEGAPIXEL, Plan(1, slicing=False, tiling=True)),
        (0.5, 8, MEGAPIXEL, Plan(1, slicing=False, tiling=True)),
    ],
)
def test_a_job_takes_the_largest_batch_that_fits_and_tiles_only_where_it_must(
    free_gb: float,
    num_images: int,
    pixels: int,
    expected: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = plan_on_gpu(free_gb * 1e9, monkeypatch, num_images=num_images, pixels=pixels)
    assert planned == expected


def test_a_decoder_that_runs_in_32_bits_needs_twice_the_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype, slicing in ((torch.float32, True), (torch.float16, False)):
        planned = plan_on_gpu(
            20e9, monkeypatch, num_images=8, pixels=MEGAPIXEL, decoder_dtype=dtype
        )
        assert planned.slicing is slicing


def test_on_a_cpu_all_pictures_are_one_batch() -> None:
    planned = memory.plan(
        torch.device("cpu"),
        torch.float32,
        num_images=8,
        pixels=MEGAPIXEL,
        decoder_dtype=torch.float32,
    )
    assert planned == Plan(8, slicing=False, tiling=False)


# --- compiled ------------------------------------------------------------------------------------


COMPILED = """
import json, sys, time
from pathlib import Path
import torch
from sdxl_worker import check
from sdxl_worker.generate import generate
from sdxl_worker.model_dir import find_model_dir
from sdxl_worker.models import load_models
from sdxl_worker.weights import start_reading
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings

settings = Settings(model_dir=sys.argv[1], compile="blocks", compile_cache_dir=sys.argv[2])
started = time.perf_counter()
check.prepare(settings, start_reading(find_model_dir(settings), None))
seconds = time.perf_counter() - started
[picture] = generate(parse_request(json.loads(sys.argv[3])), load_models(settings))
counters = torch._dynamo.utils.counters["inductor"]
print(json.dumps({
    "seconds": seconds, "pixels": picture.tobytes().hex(),
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


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="compiling for the CPU needs a C++ compiler: install g++",
)
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

    [plain] = generate(parse_request({**REQUESTS["base"], "height": 64, "width": 64}), models())
    picture = Image.frombytes("RGB", (64, 64), bytes.fromhex(first["pixels"]))
    assert psnr([picture], [plain]) > 45


def other_versions(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(compile_cache, "library_versions", lambda: {"torch": "2.14.0"})
    return reading()


def other_cuda(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(torch.version, "cuda", "12.6")
    return reading()


def other_processor(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    return reading()


def a_gpu(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    patch.setattr(weights_module, "_read", lambda *_: {})
    return reading("cuda")


def other_dtype(_: pytest.MonkeyPatch) -> Weights:
    return reading(dtype=torch.float16)


def other_networks(_: pytest.MonkeyPatch) -> Weights:
    return reading(without="refiner/unet")


@pytest.mark.parametrize(
    "change",
    [other_versions, other_cuda, other_processor, a_gpu, other_dtype, other_networks],
)
def test_what_was_compiled_elsewhere_is_never_taken(
    change: Callable[[pytest.MonkeyPatch], Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compile_cache._file_name("blocks", reading())
    assert here == compile_cache._file_name("blocks", reading())
    assert here != compile_cache._file_name("full", reading())
    assert here != compile_cache._file_name("blocks", change(monkeypatch))


def test_a_cache_that_cannot_be_read_or_written_costs_the_start_not_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"artifacts", None))
    settings = Settings(compile="blocks", compile_cache_dir=tmp_path)
    path = tmp_path / compile_cache._file_name("blocks", reading())
    path.write_bytes(b"damaged")
    with compile_cache.kept(settings, reading()):
        pass
    assert "is damaged, compiling anew" in caplog.text
    assert path.read_bytes() == b"artifacts", "replaced by a whole one"
    assert list(tmp_path.iterdir()) == [path]

    (tmp_path / "file").touch()
    no_folder = Settings(compile="full", compile_cache_dir=tmp_path / "file")
    with compile_cache.kept(no_folder, reading()):
        pass
    assert "could not be kept" in caplog.text


def test_nothing_is_kept_where_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.compiler, "save_cache_artifacts", lambda: pytest.fail("nothing was compiled")
    )
    for settings in (Settings(compile_cache_dir=tmp_path), Settings(compile="full")):
        with compile_cache.kept(settings, reading()):
            pass
    assert list(tmp_path.iterdir()) == []
