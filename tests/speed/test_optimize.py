"""Fast, and the same picture: each optimization and each mode of COMPILE against the plain path."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.ways import psnr_db
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import CHECK_INPUT, parse_request
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.start import start
from sdxl_worker.serving.threads import start_on_gpu_thread
from sdxl_worker.settings import Settings
from sdxl_worker.speed.compiling import at_the_start, compiles
from sdxl_worker.speed.optimize import (
    MODES,
    OPTIMIZATIONS,
    optimizations_of,
    optimize,
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


@pytest.mark.parametrize("mode", [None, "graphs", "blocks", "full"])
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


def tiny_unet() -> Any:
    """SDXL's architecture in two levels, of random numbers: compiled in seconds."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    ).eval()


def pass_of(rows: int, height: int, width: int, tokens: int = 77) -> dict[str, Any]:
    """What the pipelines give a UNet. Sizes are of latents."""
    torch.manual_seed(1)
    return {
        "sample": torch.randn(rows, 4, height, width),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": torch.randn(rows, tokens, 24),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, 24),
            "time_ids": torch.ones(rows, 6),
        },
        "return_dict": False,
    }


@pytest.fixture
def stance() -> Iterator[None]:
    """Of the process: a start changes it for good."""
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@COMPILES
@pytest.mark.usefixtures("stance")
@torch.no_grad()
def test_the_code_of_a_whole_unet_is_for_all_shapes_and_computes_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    unet, plain = tiny_unet(), tiny_unet()
    optimize(["compile_unet"], unet)
    with at_the_start(["compile_unet"]):
        unet(**pass_of(2, 16, 16))
    shapes = [(2, 16, 16), (1, 16, 16), (4, 24, 8), (3, 8, 32, 154)]
    for shape in shapes:
        (output,) = unet(**pass_of(*shape))
        torch.testing.assert_close(output, plain(**pass_of(*shape))[0], rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "no compiled code" not in caplog.text


@pytest.fixture
def compiled_for(stance: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:  # noqa: ARG001
    """The graphs that are compiled, in place of any code."""
    made: list[Any] = []
    compile_function = torch.compile

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    def compile_module(module: torch.nn.Module, **options: Any) -> None:
        module._compiled_call_impl = compile_function(module._call_impl, backend=backend, **options)

    monkeypatch.setattr(
        torch, "compile", lambda what, **options: compile_function(what, backend=backend, **options)
    )
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    monkeypatch.setattr(start_module, "_starts", {})  # each test has a start of its own
    return made


OF_A_START = {**REQUESTS["refined"], "height": 64, "width": 64, "num_inference_steps": 2}
OTHER_JOBS = {
    "another size": {"height": 96, "width": 160},
    "more pictures": {"num_images": 2},
    "no guidance": {"guidance_scale": 1},
    "a long prompt": {"prompt": "a red circle and a blue square " * 20},
    "a sampler of whole timesteps": {"scheduler": "DDIM"},
    "a sampler of others": {"scheduler": "K_EULER"},
}


@pytest.mark.parametrize(("mode", "networks_or_blocks"), [("blocks", 4), ("full", 3)])
def test_a_job_of_whatever_shape_finds_the_code_that_was_made_at_the_start(
    mode: Any, networks_or_blocks: int, compiled_for: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    started = start(Settings(compile=mode)).result()
    assert len(compiled_for) == networks_or_blocks

    def jobs() -> None:
        if mode == "blocks":
            # As after a start, with a voice. The decoder has other code for several pictures, for
            # torch convolves them by another library, on a CPU.
            torch.compiler.set_stance("fail_on_recompile")
        for changed in OTHER_JOBS.values():
            draw(parse_request({**OF_A_START, **changed}), started)

    start_on_gpu_thread(jobs).result()
    assert len(compiled_for) == networks_or_blocks
    assert "the UNet has no compiled code" not in caplog.text


def test_what_there_is_no_code_for_is_drawn_without_and_can_be_cancelled_and_is_told_once(
    compiled_for: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Sides that are no multiples of 32: diffusers calls a UNet's blocks otherwise for them."""
    caplog.set_level("INFO")
    started = start(Settings(compile="full")).result()
    compiled_for.clear()
    request = parse_request({**OF_A_START, "height": 72})
    steps: list[Any] = []

    class CancelledError(Exception):
        pass

    def cancel(step: Any) -> None:
        steps.append(step)
        raise CancelledError

    with pytest.raises(CancelledError):
        start_on_gpu_thread(draw, request, started, on_step=cancel).result()
    assert len(steps) == 1
    drawn = [start_on_gpu_thread(draw, request, started).result() for _ in range(2)]
    assert compiled_for == []
    for pictures in drawn:
        assert psnr_db(pictures, draw(request, models())) > 45
    told = [line for line in caplog.messages if "no compiled code" in line]
    assert (
        told
        == [
            "COMPILE=full: the UNet has no compiled code for 64x72 px in 2 rows, and runs without",
        ]
        * 2
    ), "by the base and by the refiner, once each"


def test_a_model_that_a_job_names_takes_the_code_of_the_start(
    compiled_for: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = Settings(compile="full")
    first = start(settings).result()
    made = len(compiled_for)
    other = start_on_gpu_thread(start_module._load_and_draw, first.model_dir, settings).result()
    assert other.unet is not first.unet
    assert other.unet.forward is not first.unet.forward
    assert len(compiled_for) == made
    assert "no compiled code" not in caplog.text
