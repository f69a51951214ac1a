"""Fast, and the same picture: each optimization and each mode of COMPILE against the plain path."""

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.ways import psnr_db
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import CHECK_INPUT, parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.speed.compiling import at_the_start, compiles
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


@pytest.fixture(scope="module", params=["graphs", pytest.param("blocks", marks=COMPILES)])
def optimized(request: pytest.FixtureRequest) -> Iterator[Models]:
    """Models in a mode of COMPILE, as a GPU would have them but for one thing: what is compiled for
    a CPU cannot be recorded by the stand-in. `full` takes minutes to compile on a CPU: its parts
    are below."""
    request.getfixturevalue("all_recordings")  # the stand-in
    mode = MODES[request.param]
    changed = fresh_models()
    optimize_models(changed, mode - {"cuda_graphs"} if compiles(mode) else mode)
    torch._dynamo.reset()
    with at_the_start(mode):
        draw(parse_request(CHECK_INPUT), changed)
    if compiles(mode):
        torch.compiler.set_stance("fail_on_recompile")  # all that follows has compiled code
    yield changed
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", test_meaning.MODES)
def test_each_mode_draws_what_the_prompt_says_and_the_plain_picture(
    mode: str, optimized: Models
) -> None:
    for seed, prompt in enumerate(test_meaning.PROMPTS):
        request = parse_request({"prompt": prompt, "seed": seed, **test_meaning.MODES[mode]})
        [picture] = draw(request, optimized)
        test_meaning.assert_shows(picture, prompt)
        assert psnr_db([picture], draw(request, models())) > 45


def test_a_mode_draws_other_sizes_batches_and_without_guidance(optimized: Models) -> None:
    """With the same code, or recordings of their own."""
    for changed in (
        {"height": 96, "width": 160},
        {"height": 72, "width": 104},
        {"num_images": 3},
        {"guidance_scale": 1},
        {"prompt": "a red circle and a blue square " * 20},
    ):
        request = parse_request({**REQUESTS["refined"], **changed})
        assert psnr_db(draw(request, optimized), draw(request, models())) > 45
