"""Fast, and the same picture: each optimization and each mode of COMPILE against the plain path."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.ways import psnr_db
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import CHECK_INPUT, parse_request
from sdxl_worker.serving.start import start
from sdxl_worker.serving.threads import start_on_gpu_thread
from sdxl_worker.settings import Settings
from sdxl_worker.speed.compiling import compiles, for_one_size
from sdxl_worker.speed.optimize import (
    MODES,
    OPTIMIZATIONS,
    optimizations_of,
)
from tests.shapes import test_meaning
from tests.support import (
    REQUESTS,
    draw,
    fresh_models,
    models,
    optimize_models,
)


def test_every_optimization_of_the_modes_exists() -> None:
    assert set.union(*map(set, MODES.values())) <= set(OPTIMIZATIONS)
    assert all("channels_last" in optimizations for optimizations in MODES.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_takes_only_what_its_machine_can_do(mode: Any) -> None:
    on_cpu = Placement(torch.device("cpu"), torch.float32, resident=True)
    on_gpu = dataclasses.replace(on_cpu, device=torch.device("cuda"))
    offloaded = dataclasses.replace(on_gpu, resident=False)
    assert not {"channels_last", "cuda_graphs"} & set(
        optimizations_of(Settings(compile=mode), on_cpu)
    )
    assert set(optimizations_of(Settings(compile=mode), on_gpu)) == MODES[mode]
    assert not {"cuda_graphs", "compile_unet"} & set(
        optimizations_of(Settings(compile=mode), offloaded)
    )
    assert "fuse_qkv" not in MODES[mode], "LoRA would be left out"


@pytest.mark.parametrize("optimization", ["channels_last", "fuse_qkv"])
@pytest.mark.parametrize("mode", REQUESTS)
def test_an_optimization_leaves_the_picture_the_same(optimization: str, mode: str) -> None:
    request = parse_request({**REQUESTS[mode], "num_images": 2})
    optimized = fresh_models()
    optimize_models(optimized, [optimization])
    changed = draw(request, optimized)
    assert psnr_db(changed, draw(request, models())) > 45


def test_optimizations_change_the_networks() -> None:
    """So that the comparison above is one."""
    optimized = fresh_models()
    optimize_models(optimized, ["channels_last", "fuse_qkv"])
    convolution = optimized.unet.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not models().unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    decoders = optimized.vae.decoder.conv_in.weight
    assert decoders.is_contiguous(memory_format=torch.channels_last)
    assert any(name.endswith("to_qkv") for name, _ in optimized.unet.named_modules())


COMPILES = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="compiling for the CPU needs a C++ compiler: install g++",
)


@pytest.fixture(
    scope="module",
    params=["graphs", pytest.param("blocks", marks=COMPILES), pytest.param("full", marks=COMPILES)],
)
def optimized(request: pytest.FixtureRequest) -> Models:
    """Models in a mode of COMPILE, as a GPU would have them but for one thing: what is compiled for
    a CPU cannot be recorded by the stand-in."""
    request.getfixturevalue("all_recordings")  # the stand-in
    mode = MODES[request.param]
    changed = fresh_models()
    optimize_models(changed, mode - {"cuda_graphs"} if compiles(mode) else mode)
    with for_one_size(mode):
        draw(parse_request(CHECK_INPUT), changed)
    return changed


@pytest.mark.parametrize("mode", test_meaning.MODES)
def test_each_mode_draws_what_the_prompt_says_and_the_plain_picture(
    mode: str, optimized: Models
) -> None:
    for seed, prompt in enumerate(test_meaning.PROMPTS):
        request = parse_request({"prompt": prompt, "seed": seed, **test_meaning.MODES[mode]})
        [picture] = draw(request, optimized)
        test_meaning.assert_shows(picture, prompt)
        assert psnr_db([picture], draw(request, models())) > 45


@pytest.mark.parametrize(
    "optimized", ["graphs", pytest.param("blocks", marks=COMPILES)], indirect=True
)
def test_a_mode_draws_other_sizes_batches_and_without_guidance(optimized: Models) -> None:
    """Each is a shape of its own. `full` takes minutes for them on a CPU: not in the suite."""
    for changed in ({"height": 96, "width": 160}, {"num_images": 3}, {"guidance_scale": 1}):
        request = parse_request({**REQUESTS["refined"], **changed})
        assert psnr_db(draw(request, optimized), draw(request, models())) > 45


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

    def compiled_after(height: int) -> int:
        request = parse_request({**REQUESTS["refined"], "height": height, "width": 64})
        start_on_gpu_thread(draw, request, started).result()
        return len(compiled_for)

    started = start(Settings(compile=mode)).result()
    assert are_for_all_sizes() == [False] * networks_or_blocks
    after_another_size = compiled_after(96)
    assert after_another_size > networks_or_blocks
    assert all(are_for_all_sizes()[networks_or_blocks:])
    assert compiled_after(160) == after_another_size


@pytest.mark.usefixtures("compiled_for")
def test_the_thread_that_draws_may_compile_for_many_shapes() -> None:
    """The setting is each thread's own, and 8 by itself: further shapes would end their jobs."""
    start(Settings(compile="blocks")).result()
    limit = start_on_gpu_thread(lambda: torch._dynamo.config.recompile_limit).result()
    assert limit == 64
