"""QUANTIZE: what it changes, that pictures survive it, and where it is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image

from benchmarks.ways import psnr_db
from sdxl_worker.errors import ModelError
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.serving.start import start
from sdxl_worker.settings import Settings, load_settings
from sdxl_worker.speed import quantize as quantize_module
from sdxl_worker.speed.optimize import MODES, optimizations_of, optimize
from sdxl_worker.speed.quantize import INT8_ROWS, check_quantization
from shapes.judge import judge
from tests import inpainting_model
from tests.support import (
    PROMPT,
    canvas_of,
    decoded,
    draw,
    fresh_models,
    models,
    noise_picture,
    optimize_models,
    run,
)

JOB = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 12, "refiner_inference_steps": 12}
SHORT_JOB = {**JOB, "num_inference_steps": 2, "height": 64, "width": 64}
ON_GPU = Placement(torch.device("cuda"), torch.float16, resident=True)
OFFLOADED = Placement(torch.device("cuda"), torch.float16, resident=False)
ON_CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


def quantized(quantization: str) -> Models:
    made = fresh_models()
    optimize_models(made, [quantization])
    return made


@pytest.fixture(scope="module")
def int8() -> Models:
    return quantized("int8")


@pytest.fixture(scope="module")
def fp8() -> Models:
    """As a GPU computes it, but slowly: torch multiplies fp8 on a CPU, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda _: None)
        return quantized("fp8")


def drawn(loaded: Models, **job_input: Any) -> list[Image.Image]:
    return draw(parse_request({**JOB, **job_input}), loaded)


def unets(loaded: Models) -> list[Any]:
    return [loaded.unet, loaded.refiner_unet]


def attention(loaded: Models) -> Any:
    return loaded.unet.mid_block.attentions[0].transformer_blocks[0].attn1


def rounded(network: torch.nn.Module) -> set[str]:
    """The names of its tensors that torchao replaced."""
    return {
        name
        for name, tensor in network.named_parameters()
        if type(tensor.data).__module__.startswith("torchao")
    }


def test_without_the_setting_nothing_is_rounded() -> None:
    assert load_settings().quantize is None
    assert not any(rounded(unet) for unet in unets(models()))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_the_linears_of_the_transformer_blocks_are_rounded_and_nothing_else(
    quantization: str, request: pytest.FixtureRequest
) -> None:
    rounded_models: Models = request.getfixturevalue(quantization)
    blocks = 7
    linears = [
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        *("attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"),
    ]
    for unet, plain in zip(unets(rounded_models), unets(models()), strict=True):
        names = rounded(unet)
        assert len(names) == blocks * len(linears)
        assert {name.partition("transformer_blocks.0.")[2] for name in names} == {
            f"{linear}.weight" for linear in linears
        }
        others = {name: value for name, value in unet.state_dict().items() if name not in names}
        for name, value in others.items():
            assert torch.equal(value, plain.state_dict()[name]), name
    for part in ("text_encoder", "text_encoder_2", "vae"):
        assert not rounded(getattr(rounded_models, part))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize(
    "more",
    [
        {"refiner_inference_steps": 0},
        {},
        {"high_noise_frac": 0.8},
        {"scheduler": "K_EULER_ANCESTRAL"},
        {"scheduler": "DPMSolverMultistep"},
    ],
    ids=str,
)
def test_pictures_show_what_was_asked_for_and_are_close_to_the_plain_ones(
    more: dict[str, Any], quantization: str, request: pytest.FixtureRequest
) -> None:
    pictures = drawn(request.getfixturevalue(quantization), **more)
    assert judge(pictures[0]).matches(PROMPT)
    psnr = psnr_db(pictures, drawn(models(), **more))
    assert psnr > (35 if quantization == "int8" else 25)
    assert psnr < 99, "it is lossy"


def test_a_unet_for_inpainting_is_rounded_as_well(tmp_path: Path) -> None:
    folder = inpainting_model.write(tmp_path / "model")
    plain, rounded_models = (
        load_models(find_model_dir(Settings(model_dir=folder))) for _ in range(2)
    )
    optimize(["int8"], rounded_models.unet)
    hole = np.zeros((128, 128), bool)
    hole[32:96, 32:96] = True
    canvas = canvas_of(noise_picture(128, 128), hole)
    job = {**JOB, "image_url": "https://a.org/a", "mask_url": "https://a.org/b"}
    request = parse_request({**job, "refiner_inference_steps": 0})
    both = (draw(request, loaded, canvas) for loaded in (rounded_models, plain))
    assert 99 > psnr_db(*both) > 35


def test_in_int8_no_picture_depends_on_the_others_of_its_batch(int8: Models) -> None:
    linear = attention(int8).to_q
    batch = torch.randn(2, 20, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        [first, second] = linear(batch)
        batch[1] *= 100
        assert torch.equal(linear(batch)[0], first)
        assert not torch.equal(linear(batch)[1], second)


def test_int8_never_multiplies_fewer_rows_than_cublas_takes(
    int8: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deep in the refiner a picture of 64 x 64 pixels is a single row."""
    product = torch._int_mm
    rows = []

    def counted(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        rows.append(one.shape[0])
        return product(one, other)

    monkeypatch.setattr(torch, "_int_mm", counted)
    small = {**SHORT_JOB, "guidance_scale": 1, "strength": 0.5}
    pictures = drawn(int8, **small)
    assert min(rows) == INT8_ROWS
    assert psnr_db(pictures, drawn(models(), **small)) > 35


def test_int8_is_compiled_with_its_scales_inside_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the 32-bit sums go through memory. As it stands when the compiler is called."""
    from torch._inductor import config

    monkeypatch.setattr(config, "force_fuse_int_mm_with_mul", False)
    made = quantized("int8")
    seen: list[bool] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(config.force_fuse_int_mm_with_mul)
        return graph.forward

    block = attention(made)
    block.compile(backend=backend)
    block(torch.zeros(1, 64, block.to_q.in_features))
    torch._dynamo.reset()
    assert seen
    assert all(seen)


def test_fp8_of_nothing_is_nothing(fp8: Models) -> None:
    """And not 0 / 0: the text of an empty negative prompt is zeros."""
    linear = attention(fp8).to_q
    with torch.no_grad():
        assert not linear(torch.zeros(1, 20, linear.in_features)).any()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_block_is_compiled_whole_and_once_for_all_of_its_width(
    quantization: str, request: pytest.FixtureRequest
) -> None:
    """With a compiler that stops short of C++: the rest takes a minute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    unet = request.getfixturevalue(quantization).unet
    blocks = [part for part in unet.modules() if isinstance(part, BasicTransformerBlock)]
    widths = []
    for block in blocks:
        widths.append(block.attn1.to_q.in_features)
        compiled = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
        states, texts = torch.randn(1, 16, widths[-1]), torch.randn(1, 77, 112)
        with torch.no_grad():
            assert compiled(states, encoder_hidden_states=texts).isfinite().all()
    assert len(blocks) == 7
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(set(widths)) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("quantization", "mode", "placement", "capability", "told"),
    [
        ("fp8", "full", ON_CPU, None, "fp8 needs a GPU of compute capability 8.9 or newer"),
        ("fp8", "full", ON_GPU, (8, 6), "take int8, or leave it unset"),
        ("int8", None, ON_GPU, (8, 0), "set COMPILE=blocks"),
        ("fp8", "graphs", ON_GPU, (9, 0), "set COMPILE=blocks"),
        ("int8", "blocks", OFFLOADED, (8, 0), "weights that stay on the GPU"),
    ],
)
def test_what_cannot_be_or_would_not_pay_is_refused_with_what_to_do(
    quantization: Any,
    mode: Any,
    placement: Placement,
    capability: tuple[int, int] | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ModelError, match=f"^QUANTIZE: .*{told}"):
        check_quantization(
            quantization, optimizations_of(Settings(compile=mode), placement), placement
        )


def test_a_step_cache_leaves_only_the_blocks_to_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    blocks, full = (
        optimizations_of(Settings(compile=mode, step_cache=2), ON_GPU)
        for mode in ("blocks", "full")
    )
    check_quantization("fp8", blocks, ON_GPU)
    with pytest.raises(ModelError, match="or COMPILE=full without STEP_CACHE"):
        check_quantization("fp8", full, ON_GPU)


def test_offloading_is_refused_only_beside_it() -> None:
    assert optimizations_of(Settings(), OFFLOADED) == MODES[None]
    with pytest.raises(ModelError, match="QUANTIZE: needs weights that stay on the GPU"):
        optimizations_of(Settings(quantize="int8"), OFFLOADED)


@pytest.mark.parametrize(
    ("quantization", "mode", "placement"),
    [
        ("int8", None, ON_CPU),
        ("int8", "blocks", ON_GPU),
        ("fp8", "full", ON_GPU),
    ],
)
def test_the_rest_is_not(
    quantization: Any, mode: Any, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_quantization(quantization, optimizations_of(Settings(compile=mode), placement), placement)


def test_a_worker_that_cannot_do_fp8_does_not_start() -> None:
    with pytest.raises(ModelError, match="QUANTIZE: fp8 needs a GPU"):
        start(Settings(quantize="fp8")).result()


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE", "int4")
    with pytest.raises(ModelError, match='QUANTIZE: must be one of int8, fp8; got "int4'):
        load_settings()


def test_pictures_and_reports_tell_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, plain_report = run(SHORT_JOB), run({**SHORT_JOB, "check": True})
    monkeypatch.setenv("QUANTIZE", "int8")
    lossy, lossy_report = run(SHORT_JOB), run({**SHORT_JOB, "check": True})
    assert "settings" not in decoded(plain["image_url"]).info
    assert json.loads(decoded(lossy["image_url"]).info["settings"]) == {"QUANTIZE": "int8"}
    assert plain_report["quantization"] is None
    assert lossy_report["quantization"] == "int8"
    assert len(json.dumps(lossy_report)) < 2000
    assert plain_report["sha256"] != lossy_report["sha256"]


@pytest.mark.filterwarnings("ignore")
def test_int8_without_compiled_code_ends_a_recording_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchao would read from the GPU, which breaks it."""
    unet = fresh_models().unet
    optimize(["int8"], unet)
    linear = next(one for one in unet.modules() if isinstance(one, quantize_module._InEnoughRows))
    states = torch.ones(1, 20, linear.in_features)
    assert linear(states).isfinite().all()
    monkeypatch.setattr(quantize_module, "_is_recording", lambda: True)
    with pytest.raises(RuntimeError, match="without compiled code"):
        linear(states)
