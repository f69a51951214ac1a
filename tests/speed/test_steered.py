"""What is left out where ControlNets or IP-Adapters steer a drawing: never the picture, never in
silence, and nothing is compiled within a job."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.ways import psnr_db
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from sdxl_worker.speed.cuda_graphs import GraphedForward
from sdxl_worker.speed.optimize import optimize
from sdxl_worker.speed.steered import CompiledForward, compiled_where_it_can_be, left_out
from tests.control_networks import control, draw_controlled, single
from tests.support import JOB, draw, fresh_models, largest_difference, models

SMALL = {**JOB, "refiner_inference_steps": 0, "height": 64, "width": 64}
ADDED = {"text_embeds": torch.ones(1), "time_ids": torch.ones(1)}
RESIDUALS: dict[str, Any] = {
    "down_block_additional_residuals": [torch.ones(1)],
    "mid_block_additional_residual": torch.ones(1),
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts what is compiled; in place of any code, Python's own is run."""
    made: list[int] = []
    compile_function = torch.compile

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(1)
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


def drawn(some_models: Models, controls: Any = (), **options: Any) -> Any:
    [picture] = draw_controlled(parse_request(SMALL), some_models, controls, **options)
    return picture


@pytest.mark.parametrize("mode", ["compile_blocks", "compile_unet"])
def test_a_job_with_controlnets_compiles_nothing_and_draws_the_same(
    mode: str, compiled: list[int]
) -> None:
    """Blocks are called as ever; what is compiled as a whole is left out for its steps."""
    optimized = fresh_models()
    optimize([mode], optimized.unet)
    before = drawn(optimized)
    assert compiled
    compiled.clear()
    controls = [control(end=0.5), control(single(), None)]
    assert psnr_db([drawn(optimized, controls)], [drawn(models(), controls)]) > 45
    assert drawn(optimized).tobytes() == before.tobytes()
    assert compiled == []


def test_what_is_compiled_as_a_whole_runs_in_steps_without_controlnets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def forward(*_: Any, **__: Any) -> tuple[()]:
        ran.append("plain")
        return ()

    whole = CompiledForward(forward)
    monkeypatch.setattr(whole, "_compiled", lambda *_: ran.append("compiled"))
    inputs = [torch.ones(1)] * 3
    whole(*inputs, added_cond_kwargs=ADDED, cross_attention_kwargs=None, timestep_cond=None)
    whole(*inputs, added_cond_kwargs=ADDED, **RESIDUALS)
    whole(*inputs, added_cond_kwargs={**ADDED, "image_embeds": []})
    whole(*inputs, added_cond_kwargs=ADDED, cross_attention_kwargs={"ip_adapter_masks": []})
    assert ran == ["compiled", "plain", "plain", "plain"]


def test_what_is_not_compiled_of_a_whole_unet_is_not_recorded_either(
    recordings: list[Any],
) -> None:
    """torchao's int8 cannot be."""
    unet = fresh_models().unet
    optimize(["compile_unet", "cuda_graphs"], unet)
    assert isinstance(unet.forward, GraphedForward)
    assert isinstance(unet.forward.recorded, CompiledForward)
    ran: list[Any] = []
    unet.forward.recorded._forward = lambda *_, **__: ran.append(1)
    unet.forward(torch.ones(1), torch.ones(()), torch.ones(1), added_cond_kwargs=ADDED, **RESIDUALS)
    assert ran == [1]
    assert recordings == []


def test_blocks_run_without_their_code_only_beside_image_prompts(compiled: list[int]) -> None:
    """They have another class of attention then, for which each would be compiled anew."""
    unet = fresh_models().unet
    optimize(["compile_blocks"], unet)
    request = {"sample": torch.zeros(1, 4, 8, 8), "timestep": torch.tensor(1)}
    width = unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * 16
    inputs = {
        **request,
        "encoder_hidden_states": torch.zeros(1, 77, width),
        "added_cond_kwargs": {
            "text_embeds": torch.zeros(1, pooled),
            "time_ids": torch.zeros(1, 6),
        },
    }
    with torch.no_grad(), compiled_where_it_can_be(unet, image_prompts=True):
        unet(**inputs)
    assert compiled == []
    with torch.no_grad(), compiled_where_it_can_be(unet, image_prompts=False):
        unet(**inputs)
    assert compiled


def test_the_step_cache_is_left_out_with_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    controls = [control()]
    with_cache = drawn(models(), controls, step_cache_interval=2)
    assert largest_difference(with_cache, drawn(models(), controls)) == 0
    lines = [record.getMessage() for record in caplog.records if "STEP_CACHE" in record.message]
    assert lines == ["STEP_CACHE is left out for the base of this job, which has controlnet"]
    cached = draw(parse_request(SMALL), models(), step_cache_interval=2)
    assert largest_difference(cached[0], drawn(models())) > 0, "the next job has it again"


def test_the_refiner_keeps_its_step_cache() -> None:
    deep: list[int] = []
    refiner = models().refiner_unet
    assert refiner is not None
    hook = refiner.mid_block.resnets[0].register_forward_hook(lambda *_: deep.append(1))
    request = parse_request({**SMALL, "refiner_inference_steps": 8, "strength": 0.5})
    draw_controlled(request, models(), [control()], step_cache_interval=2)
    hook.remove()
    assert len(deep) == 2


def test_the_log_names_what_is_left_out_and_why() -> None:
    def told(unet: Any, interval: int | None = None, **steering: bool) -> list[str]:
        given = {"controls": False, "image_prompts": False, **steering}
        return left_out(unet, step_cache_interval=interval, **given)

    plain, graphed, blocks, full = (fresh_models().unet for _ in range(4))
    optimize(["cuda_graphs"], graphed)
    optimize(["compile_blocks"], blocks)
    optimize(["compile_unet", "cuda_graphs"], full)
    both = {"controls": True, "image_prompts": True}
    for unet in (plain, graphed, blocks, full):
        assert told(unet, 2) == []
    for unet in (plain, graphed, blocks):
        assert told(unet, controls=True) == []
    assert told(plain, 2, **both) == [
        "STEP_CACHE is left out for the base of this job, which has controlnet and ip_adapter"
    ]
    assert told(graphed, **both) == [
        "CUDA graphs are left out for the base of this job, which has ip_adapter"
    ]
    assert told(blocks, image_prompts=True) == [
        "COMPILE=blocks is left out for the base of this job, which has ip_adapter: they would be "
        "compiled anew"
    ]
    assert told(full, controls=True) == [
        "COMPILE=full is left out for the base of this job, which has controlnet: its passes would "
        "be compiled anew"
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_unet_in_int8_is_controlled_like_any_other() -> None:
    rounded = fresh_models()
    optimize(["int8"], rounded.unet)
    controls = [control(scale=2)]
    near = psnr_db([drawn(rounded, controls)], [drawn(models(), controls)])
    assert near > 35
    assert near > psnr_db([drawn(rounded, controls)], [drawn(rounded)]) + 3
