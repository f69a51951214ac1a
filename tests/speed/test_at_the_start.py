"""Compiling happens at the start alone: one code for all shapes, and none is made within a job."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.ways import psnr_db
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.start import start
from sdxl_worker.serving.threads import start_on_gpu_thread
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed.compiling import at_the_start
from sdxl_worker.speed.optimize import optimize
from tests.support import REQUESTS, draw, models


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


@pytest.fixture(scope="module")
def stance() -> Iterator[None]:
    """Of the process: a start changes it for good."""
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.mark.usefixtures("stance")
@torch.no_grad()
def test_the_code_of_a_whole_unet_is_for_all_shapes_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a compiler that stops short of C++: the rest takes two minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    caplog.set_level("INFO", "sdxl_worker")
    unet, plain = tiny_unet(), tiny_unet()
    optimize(["compile_unet"], unet)
    with at_the_start(["compile_unet"]):
        unet(**pass_of(2, 16, 16))
    for shape in [(2, 16, 16), (1, 16, 16), (4, 24, 8), (3, 8, 32, 154)]:
        a_pass = pass_of(*shape)
        (expected,) = plain(**a_pass)
        each = a_pass["timestep"].float().expand(shape[0])
        channels_last = a_pass["sample"].to(memory_format=torch.channels_last)
        for other in ({}, {"timestep": each}, {"sample": channels_last}):
            (output,) = unet(**(a_pass | other))
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    assert "no compiled code" not in caplog.text


@pytest.fixture(scope="module")
def compiled_for(stance: None) -> Iterator[list[Any]]:  # noqa: ARG001
    """The graphs that are compiled, in place of any code."""
    made: list[Any] = []
    compile_function = torch.compile

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    def compile_module(module: torch.nn.Module, **options: Any) -> None:
        module._compiled_call_impl = compile_function(module._call_impl, backend=backend, **options)

    def compile_it(what: Any, **options: Any) -> Any:
        return compile_function(what, backend=backend, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_it)
        patch.setattr(torch.nn.Module, "compile", compile_module)
        patch.setattr(start_module, "_starts", {})
        yield made


@pytest.fixture(scope="module", params=["blocks", "full"])
def started(
    request: pytest.FixtureRequest,
    compiled_for: list[Any],  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Settings, Models]:
    """A worker with the base alone, in a mode of COMPILE."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "base").symlink_to(EMBEDDED_MODEL_DIR / "base")
    settings = Settings(model_dir=folder, compile=request.param)
    return settings, start(settings).result()


OF_A_START = {**REQUESTS["base"], "height": 64, "width": 64, "num_inference_steps": 2}
OTHER_JOBS: dict[str, dict[str, Any]] = {
    "another size": {"height": 96, "width": 160},
    "more pictures": {"num_images": 2},
    "no guidance": {"guidance_scale": 1},
    "a long prompt": {"prompt": "a red circle and a blue square " * 20},
    "a sampler of whole timesteps": {"scheduler": "DDIM"},
    "a sampler of others": {"scheduler": "K_EULER"},
}


def test_a_job_of_whatever_shape_finds_the_code_that_was_made_at_the_start(
    started: tuple[Settings, Models], compiled_for: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sdxl_worker")
    settings, some_models = started
    made = len(compiled_for)
    assert made

    def jobs() -> None:
        # As after a start, with a voice. The decoder has other code for several pictures: torch
        # convolves them by another library, on a CPU.
        stance = "fail_on_recompile" if settings.compile == "blocks" else "eager_on_recompile"
        with torch.compiler.set_stance(stance):
            for changed in OTHER_JOBS.values():
                draw(parse_request({**OF_A_START, **changed}), some_models)

    start_on_gpu_thread(jobs).result()
    assert len(compiled_for) == made
    assert "the UNet has no compiled code" not in caplog.text


def test_a_model_that_a_job_names_takes_the_code_of_the_start(
    started: tuple[Settings, Models], compiled_for: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sdxl_worker")
    settings, first = started
    made = len(compiled_for)
    other = start_on_gpu_thread(start_module._load_and_draw, first.model_dir, settings).result()
    assert other.unet is not first.unet
    assert len(compiled_for) == made
    assert "no compiled code" not in caplog.text


@pytest.mark.parametrize("started", ["full"], indirect=True)
def test_what_there_is_no_code_for_is_drawn_without_and_can_be_cancelled_and_is_told_once(
    started: tuple[Settings, Models], compiled_for: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Sides that are no multiples of 32: diffusers calls a UNet's blocks otherwise for them."""
    caplog.set_level("INFO", "sdxl_worker")
    _, some_models = started
    made = len(compiled_for)
    request = parse_request({**OF_A_START, "height": 72})
    steps: list[Any] = []

    class CancelledError(Exception):
        pass

    def cancel(step: Any) -> None:
        steps.append(step)
        raise CancelledError

    with pytest.raises(CancelledError):
        start_on_gpu_thread(draw, request, some_models, on_step=cancel).result()
    assert len(steps) == 1
    for _ in range(2):
        pictures = start_on_gpu_thread(draw, request, some_models).result()
        assert psnr_db(pictures, draw(request, models())) > 45
    assert len(compiled_for) == made
    assert [line for line in caplog.messages if "no compiled code" in line] == [
        "COMPILE=full: the UNet has no compiled code for 64x72 px in 2 rows, and runs without"
    ]
