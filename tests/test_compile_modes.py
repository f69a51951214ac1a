"""COMPILE: what each mode draws, CUDA graphs recorded by a stand-in, and the compiled code kept."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ways import psnr_db
from sdxl_worker.drawing.generate import generate
from sdxl_worker.gpu import start_on_gpu_thread
from sdxl_worker.loading import weights as weights_module
from sdxl_worker.loading.models import Models, load, load_models
from sdxl_worker.loading.weights import Weights
from sdxl_worker.request import CHECK_INPUT, parse_request
from sdxl_worker.serving import compile_cache, cuda_graphs, outputs
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed.optimize import MODES, for_one_size
from tests import test_meaning
from tests.support import (
    REQUESTS,
    SCHEDULERS,
    fresh_models,
    largest_difference,
    models,
    optimize_models,
    weights_being_read,
)

COMPILES = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="compiling for the CPU needs a C++ compiler: install g++",
)


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


@pytest.fixture(scope="module", autouse=True)
def all_recordings() -> Iterator[list[Recording]]:
    """CUDA graphs on a CPU."""
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Recording)
        patch.setattr(torch.cuda, "graph", record)
        patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        cuda_graphs._shared.cache_clear()
        yield made
        cuda_graphs._shared.cache_clear()


@pytest.fixture
def recordings(all_recordings: list[Recording]) -> list[Recording]:
    """What is recorded during a test."""
    all_recordings.clear()
    return all_recordings


# --- pictures in each mode -----------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=["graphs", pytest.param("blocks", marks=COMPILES), pytest.param("full", marks=COMPILES)],
)
def optimized(request: pytest.FixtureRequest) -> Models:
    """Models in a mode of COMPILE, as a GPU would have them but for one thing: what is compiled for
    a CPU cannot be recorded by the stand-in."""
    steps = MODES[request.param]
    compiles = any(step.startswith("compile") for step in steps)
    changed = fresh_models()
    optimize_models(changed, steps - {"cuda_graphs"} if compiles else steps)
    with for_one_size(steps):
        generate(parse_request(CHECK_INPUT), changed)
    return changed


@pytest.mark.parametrize("mode", test_meaning.MODES)
def test_each_mode_draws_what_the_prompt_says_and_the_plain_picture(
    mode: str, optimized: Models
) -> None:
    for seed, prompt in enumerate(test_meaning.PROMPTS):
        request = parse_request({"prompt": prompt, "seed": seed, **test_meaning.MODES[mode]})
        [picture] = generate(request, optimized)
        test_meaning.assert_shows(picture, prompt)
        assert psnr_db([picture], generate(request, models())) > 45


@pytest.mark.parametrize(
    "optimized", ["graphs", pytest.param("blocks", marks=COMPILES)], indirect=True
)
def test_a_mode_draws_other_sizes_batches_and_without_guidance(optimized: Models) -> None:
    """Each is a shape of its own. `full` takes minutes for them on a CPU: not in the suite."""
    for changed in ({"height": 96, "width": 160}, {"num_images": 3}, {"guidance_scale": 1}):
        request = parse_request({**REQUESTS["refined"], **changed})
        assert psnr_db(generate(request, optimized), generate(request, models())) > 45


# --- what is compiled ----------------------------------------------------------------------------


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[tuple[Any, ...]]]]:
    """The shapes of the inputs of all that is compiled, in place of any code."""
    made: list[list[tuple[Any, ...]]] = []
    compile_function = torch.compile

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        inputs = [node.meta.get("example_value") for node in graph.graph.nodes]
        made.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return graph.forward

    def compile_module(module: torch.nn.Module, **options: Any) -> None:
        module._compiled_call_impl = compile_function(module._call_impl, backend=backend, **options)

    monkeypatch.setattr(
        torch, "compile", lambda what, **options: compile_function(what, backend=backend, **options)
    )
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize(("mode", "networks_or_blocks"), [("blocks", 5), ("full", 3)])
def test_a_worker_starts_with_code_for_its_own_size_and_goes_on_with_code_for_all(
    mode: Any, networks_or_blocks: int, compiled_for: list[list[tuple[Any, ...]]]
) -> None:
    def are_for_all_sizes() -> list[bool]:
        return [
            not all(isinstance(size, int) for shape in shapes for size in shape)
            for shapes in compiled_for
        ]

    def draw(height: int) -> int:
        request = parse_request({**REQUESTS["refined"], "height": height, "width": 64})
        generate(request, load_models(settings))
        return len(compiled_for)

    settings = Settings(compile=mode)
    check.prepare(settings, weights_being_read())
    assert are_for_all_sizes() == [False] * networks_or_blocks
    after_another_size = draw(96)
    assert after_another_size > networks_or_blocks
    assert all(are_for_all_sizes()[networks_or_blocks:])
    assert draw(160) == after_another_size


def test_the_thread_that_draws_may_compile_for_many_shapes() -> None:
    """The setting is each thread's own, and 8 by itself: further shapes would end their jobs."""
    start_on_gpu_thread(load, weights_being_read(), Settings(compile="blocks")).result()
    limit = start_on_gpu_thread(lambda: torch._dynamo.config.recompile_limit).result()
    assert limit == 64


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_replayed_graphs_make_the_same_picture(scheduler: str, recordings: list[Recording]) -> None:
    """PNDM, without guidance, remembers outputs that the next replay overwrites."""
    graphed = fresh_models()
    optimize_models(graphed, ["cuda_graphs"])
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
    runs: list[int] = []

    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        runs.append(len(recordings))
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
    assert runs.count(0) >= 2, "what libraries do at first use is no part of a recording"
    for size in range(3, 3 + cuda_graphs.MAX_SHAPES):
        call(size)
    call(1)
    assert len(recordings) == 2 + cuda_graphs.MAX_SHAPES + 1


def test_after_a_recording_that_failed_the_thread_is_on_its_own_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By itself torch would not go back: it ends the recording first, and that raises."""
    on = [torch.cuda.Stream()]
    own = on[0]

    @contextlib.contextmanager
    def stream(other: Any) -> Iterator[None]:
        before, on[0] = on[0], other
        try:
            yield
        finally:
            on[0] = before

    @contextlib.contextmanager
    def record(_graph: Any, _pool: Any, other: Any, **_: Any) -> Iterator[None]:
        on[0] = other
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: on[0])
    graphed = cuda_graphs.GraphedForward(lambda sample, *_, **__: (sample,), torch.device("cpu"))
    added = {"text_embeds": torch.ones(1), "time_ids": torch.ones(1)}
    with pytest.raises(RuntimeError, match="not permitted"):
        graphed(torch.ones(1), torch.ones(()), torch.ones(1), added_cond_kwargs=added)
    assert on == [own]


# --- compiled code is kept -----------------------------------------------------------------------


COMPILED = """
import json, sys, time
from pathlib import Path
import torch
from sdxl_worker.serving import report
from sdxl_worker.drawing.generate import generate
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.loading.weights import start_reading
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

    [plain] = generate(parse_request({**REQUESTS["base"], "height": 64, "width": 64}), models())
    picture = Image.frombytes("RGB", (64, 64), bytes.fromhex(first["pixels"]))
    assert psnr_db([picture], [plain]) > 45


def other_versions(patch: pytest.MonkeyPatch) -> Weights:
    patch.setattr(compile_cache, "library_versions", lambda **_: {"torch": "2.14.0"})
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
        names.append(
            compile_cache._file_name(Settings(compile="blocks"), weights).rpartition("-")[2]
        )
    assert names[0] != names[1]


def test_what_was_compiled_of_quantized_networks_is_keyed_by_torchao_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "version", lambda name: "1" if name == "torchao" else "2")
        outputs.library_versions.cache_clear()
        here = compile_cache._file_name(
            Settings(compile="blocks", quantize="int8"), weights_being_read()
        )
        patch.setattr(outputs, "version", lambda _: "2")
        outputs.library_versions.cache_clear()
        there = compile_cache._file_name(
            Settings(compile="blocks", quantize="int8"), weights_being_read()
        )
    outputs.library_versions.cache_clear()
    assert here != there


def other_dtype(_: pytest.MonkeyPatch) -> Weights:
    return weights_being_read(dtype=torch.float16)


def other_networks(_: pytest.MonkeyPatch) -> Weights:
    return weights_being_read(without="refiner/unet")


@pytest.mark.parametrize(
    "change",
    [other_versions, other_cuda, other_processor, a_gpu, other_dtype, other_networks],
)
def test_what_was_compiled_elsewhere_is_never_taken(
    change: Callable[[pytest.MonkeyPatch], Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compile_cache._file_name(Settings(compile="blocks"), weights_being_read())
    assert here == compile_cache._file_name(Settings(compile="blocks"), weights_being_read())
    assert here != compile_cache._file_name(Settings(compile="full"), weights_being_read())
    assert here != compile_cache._file_name(Settings(compile="blocks"), change(monkeypatch))


def test_a_cache_that_cannot_be_read_or_written_costs_the_start_not_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"artifacts", None))
    settings = Settings(compile="blocks", compile_cache_dir=tmp_path)
    path = tmp_path / compile_cache._file_name(settings, weights_being_read())
    path.write_bytes(b"damaged")
    with compile_cache.kept(settings, weights_being_read()):
        pass
    assert "is damaged, compiling anew" in caplog.text
    assert path.read_bytes() == b"artifacts", "replaced by a whole one"
    assert list(tmp_path.iterdir()) == [path]

    (tmp_path / "file").touch()
    no_folder = Settings(compile="full", compile_cache_dir=tmp_path / "file")
    with compile_cache.kept(no_folder, weights_being_read()):
        pass
    assert "could not be kept" in caplog.text


def test_nothing_is_kept_where_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.compiler, "save_cache_artifacts", lambda: pytest.fail("nothing was compiled")
    )
    for settings in (Settings(compile_cache_dir=tmp_path), Settings(compile="full")):
        with compile_cache.kept(settings, weights_being_read()):
            pass
    assert list(tmp_path.iterdir()) == []
