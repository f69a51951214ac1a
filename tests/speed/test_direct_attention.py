"""Direct attention: bit for bit diffusers', a text's keys once a stage, and in no recording."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from PIL import Image

from benchmarks.flops import meta_networks, unet_inputs
from benchmarks.sdxl_architecture import write_configs
from sdxl_worker.adapters.of_request import Adapters
from sdxl_worker.drawing.batches import MARGIN_BYTES
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.image_prompts import ImagePrompt, tokens_of_picture
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steering import Steering
from sdxl_worker.drawing.steps import Step
from sdxl_worker.loading.ip_adapters import find_ip_adapter
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.speed import direct_attention
from sdxl_worker.speed.direct_attention import (
    MOST_KEPT_BYTES,
    DirectAttention,
    attend_directly,
    text_keys_kept,
)
from sdxl_worker.speed.optimize import MODES, optimizations_of, optimize
from sdxl_worker.speed.shared_passes import draw_side_by_side
from sdxl_worker.speed.steered import CompiledForward
from tests import random_ip_adapters
from tests.adapters.lora_files import lora_of, low_rank
from tests.control_networks import control, single
from tests.support import JOB, PROMPT, fresh_models, load, optimize_models, weights_being_read

SMALL: dict[str, Any] = {**JOB, "height": 64, "width": 64, "num_inference_steps": 3}
BASE: dict[str, Any] = {**SMALL, "refiner_inference_steps": 0}
JOBS: dict[str, dict[str, Any]] = {
    "base": BASE,
    "refined": {**SMALL, "strength": 0.5},
    "ensemble": {**SMALL, "high_noise_frac": 0.5},
    "without guidance": {**SMALL, "strength": 0.5, "guidance_scale": 1},
    "batch": {**SMALL, "strength": 0.5, "num_images": 3},
    "texts of several chunks": {**BASE, "prompt": f"{PROMPT}, " * 30, "negative_prompt": "green"},
    "a sampler that remembers": {**BASE, "scheduler": "PNDM"},
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest) -> tuple[Models, Models]:
    return plain_and_direct(request.param)


@pytest.fixture(scope="module")
def plain() -> Models:
    return fresh_models()


@pytest.fixture
def direct() -> Models:
    models = fresh_models()
    optimize_models(models, ["direct_attention"])
    return models


def plain_and_direct(dtype: torch.dtype) -> tuple[Models, Models]:
    plain, direct = (fresh_models(dtype=dtype) for _ in range(2))
    optimize_models(direct, ["direct_attention"])
    return plain, direct


def drawn(job: dict[str, Any], models: Models, **options: Any) -> list[Image.Image]:
    request = parse_request(job)
    return generate(request, plan_stages(request, models), models, **options)


def passes(job: dict[str, Any], models: Models, **options: Any) -> list[torch.Tensor]:
    """What the UNets made in each pass of a job."""
    made: list[torch.Tensor] = []
    hooks = [
        unet.register_forward_hook(lambda *given: made.append(given[-1][0].clone()))
        for unet in models.unets()
    ]
    drawn(job, models, **options)
    for hook in hooks:
        hook.remove()
    return made


def assert_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    assert len(some) == len(others) > 2
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


def projections(unet: Any) -> list[Any]:
    """Of the text, to keys and values."""
    names = ("attn2.to_k", "attn2.to_v")
    return [module for name, module in unet.named_modules() if name.endswith(names)]


@pytest.fixture
def projected() -> Iterator[Callable[[Any], list[int]]]:
    """Counts how often a UNet projects texts, to keys and to values."""
    hooks = []

    def count(unet: Any) -> list[int]:
        counts: list[int] = []
        for module in projections(unet):
            hooks.append(module.register_forward_hook(lambda *_: counts.append(1)))
        return counts

    yield count
    for hook in hooks:
        hook.remove()


def inputs_of(unet: Any, rows: int, tokens: int = 77) -> dict[str, Any]:
    """Of a pass, random and the same each time."""
    random = torch.Generator().manual_seed(3)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(one) for name, one in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return torch.rand(value.shape, generator=random).to(value.dtype)

    made = unet_inputs(unet, rows, 64, 64)
    width = made["encoder_hidden_states"].shape[-1]
    made["encoder_hidden_states"] = torch.empty(rows, tokens, width, device="meta")
    return filled(made)


@pytest.mark.parametrize("job", JOBS)
def test_every_pass_is_bit_for_bit_as_with_diffusers_own(
    job: str, pair: tuple[Models, Models]
) -> None:
    plain, direct = pair
    assert_same(passes(JOBS[job], direct), passes(JOBS[job], plain))


def test_it_takes_the_place_of_diffusers_own_in_both_unets(direct: Models, plain: Models) -> None:
    """So that the comparison above is one."""
    for mine, theirs in zip(direct.unets(), plain.unets(), strict=True):
        assert {type(one) for one in mine.attn_processors.values()} == {DirectAttention}
        assert {type(one) for one in theirs.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(("job", "stages"), [("base", 1), ("refined", 2), ("batch", 2)])
def test_a_text_s_keys_and_values_are_computed_once_a_stage(
    job: str, stages: int, direct: Models, projected: Callable[[Any], list[int]]
) -> None:
    counts = [projected(unet) for unet in direct.unets()]
    drawn(JOBS[job], direct)
    expected = [len(projections(unet)) for unet in direct.unets()]
    assert [len(one) for one in counts] == [*expected[:stages], *[0] * (2 - stages)]


def test_nothing_divides_by_1_in_an_attention(direct: Models, plain: Models) -> None:
    def divisions(unet: Any) -> int:
        with torch.profiler.profile() as profiled, torch.no_grad():
            unet(**inputs_of(unet, 1))
        return sum(event.name == "aten::div" for event in profiled.events())

    attentions = [module for module in plain.unet.modules() if isinstance(module, Attention)]
    assert divisions(plain.unet) - divisions(direct.unet) == len(attentions)


@torch.no_grad()
def test_other_states_are_never_taken_for_those_before(direct: Models, plain: Models) -> None:
    """Another object, one that was written to, and fewer rows: guidance may end within a stage."""
    inputs = inputs_of(direct.unet, 2)
    with text_keys_kept(direct.unet):

        def assert_as_plain() -> None:
            assert torch.equal(direct.unet(**inputs)[0], plain.unet(**inputs)[0])

        assert_as_plain()
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] * 1.1
        assert_as_plain()
        inputs["encoder_hidden_states"].mul_(1.1)
        assert_as_plain()
        halves = inputs_of(direct.unet, 1)
        inputs |= halves | {"encoder_hidden_states": inputs["encoder_hidden_states"][1:]}
        assert_as_plain()
        assert_as_plain()


@torch.no_grad()
def test_the_next_stage_has_nothing_of_the_one_before(plain: Models, direct: Models) -> None:
    """Texts' states are kept between jobs: the same object may meet other weights."""
    changed = fresh_models().unet
    inputs = inputs_of(plain.unet, 1)
    with text_keys_kept(direct.unet):
        before = direct.unet(**inputs)[0]
    for unet in (direct.unet, changed):
        for module in projections(unet):
            module.weight.data.mul_(1.5)
    with text_keys_kept(direct.unet):
        after = direct.unet(**inputs)[0]
    assert torch.equal(before, plain.unet(**inputs)[0])
    assert torch.equal(after, changed(**inputs)[0])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_nothing_is_kept_when_a_stage_has_ended(is_stopped: bool, direct: Models) -> None:
    kept: list[Any] = []

    def look(_: Step) -> None:
        kept.append(len(direct.unet.direct_attention.kept))
        if is_stopped:
            raise InterruptedError

    hook = direct.vae.decoder.register_forward_pre_hook(
        lambda *_: kept.append(direct.unet.direct_attention.kept)
    )
    try:
        drawn(BASE, direct, on_step=look)
    except InterruptedError:
        assert is_stopped
    hook.remove()
    texts = len(projections(direct.unet)) // 2
    assert kept == ([texts] if is_stopped else [texts, texts, texts, None])
    assert direct.unet.direct_attention.kept is None


def test_with_and_without_loras_in_turn_every_pass_is_the_same(
    pair: tuple[Models, Models], tmp_path: Path
) -> None:
    """The second job of the same texts, whose encodings are still there, has other weights."""
    plain, direct = pair
    torch.manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for name in plain.unet.attn_processors:
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer = f"{name.removesuffix('.processor')}.{part}"
            low = low_rank(plain.unet.get_submodule(layer).weight.float())
            tensors |= {f"lora_unet_{layer.replace('.', '_')}.{key}": low[key] for key in low}
    made = [
        [
            passes(SMALL, models),
            passes(SMALL, models, adapters=adapters),
            passes(SMALL, models),
        ]
        for models in (plain, direct)
        for adapters in [Adapters(loras=(lora_of(tmp_path, models, tensors),))]
    ]
    for theirs, mine in zip(*made, strict=True):
        assert_same(mine, theirs)
    assert not torch.equal(made[1][0][0], made[1][1][0])


@pytest.mark.parametrize("kind", ["plain", "style"])
def test_beside_ip_adapters_and_after_them_every_pass_is_the_same(
    kind: Any, pair: tuple[Models, Models], tmp_path: Path
) -> None:
    plain, direct = pair
    random_ip_adapters.make_ip_adapters(tmp_path, plain.unet)
    files = find_ip_adapter(kind, tmp_path, "ip_adapter[0].type", plain.unet)
    adapter, encoder = files.load(plain.placement), files.encoder.load(plain.placement)
    picture = Image.radial_gradient("L").convert("RGB")
    tokens = tokens_of_picture(picture, encoder, adapter, plain.placement)
    steering = Steering(image_prompts=(ImagePrompt(adapter, tokens, kind, 1.0),))
    steered = passes(BASE, direct, steering=steering)
    assert_same(steered, passes(BASE, plain, steering=steering))
    after = passes(BASE, direct)
    assert_same(after, passes(BASE, plain))
    assert not torch.equal(after[-1], steered[-1])


def test_beside_controlnets_every_pass_is_the_same(direct: Models, plain: Models) -> None:
    steering = Steering(controls=(control(end=0.5), control(single(), None)))
    assert_same(passes(BASE, direct, steering=steering), passes(BASE, plain, steering=steering))


def test_in_shallow_steps_it_is_the_same(direct: Models, plain: Models) -> None:
    of_both = (passes(SMALL, models, step_cache_interval=2) for models in (direct, plain))
    assert_same(*of_both)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", ["fuse_qkv", "channels_last", "int8"])
def test_beside_other_optimizations_it_changes_nothing_more(other: str) -> None:
    without, beside = fresh_models(), fresh_models()
    optimize_models(without, [other])
    optimize_models(beside, [other, "direct_attention"])
    assert_same(passes(BASE, beside), passes(BASE, without))


@pytest.mark.parametrize(("index", "times"), [(None, 1), (0, 3)])
def test_offloaded_networks_draw_the_same(
    index: int | None, times: int, plain: Models, projected: Callable[[Any], list[int]]
) -> None:
    """To torch, what is on "cpu" is not on "cpu:0": it is copied in each step, and never kept."""
    device = torch.device("cpu") if index is None else torch.device("cpu", index)
    placement = Placement(device, torch.float32, resident=False)
    offloaded = load(dataclasses.replace(weights_being_read(), placement=placement))
    assert hasattr(offloaded.unet, "_hf_hook")
    optimize_models(offloaded, ["direct_attention"])
    counts = projected(offloaded.unet)
    assert_same(passes(JOBS["refined"], offloaded), passes(JOBS["refined"], plain))
    assert len(counts) == times * len(projections(offloaded.unet))


def test_a_recording_has_no_text_of_its_own(
    recordings: list[Any], direct: Models, plain: Models
) -> None:
    """Graphs may be put on after a first picture."""
    assert_same(passes(BASE, direct), passes(BASE, plain))
    optimize(["cuda_graphs"], direct.unet)
    for prompt in (PROMPT, "a green square on a white background"):
        job = {**BASE, "prompt": prompt}
        assert_same(passes(job, direct), passes(job, plain))
    assert len(recordings) == 1
    assert recordings[0].replayed == 2 * 3 - 1, "the first pass is its warm-up"


def test_nothing_is_kept_where_the_unet_is_compiled(direct: Models) -> None:
    direct.unet.forward = CompiledForward(direct.unet.forward)
    with text_keys_kept(direct.unet):
        assert direct.unet.direct_attention.kept is None


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_that_compiles_has_it(mode: Any) -> None:
    """Blocks would be compiled anew for each attention, and for each text."""
    compiles = mode in ("blocks", "full")
    assert ("direct_attention" in MODES[mode]) is not compiles
    on_cpu = Placement(torch.device("cpu"), torch.float32, resident=True)
    assert ("direct_attention" in optimizations_of(Settings(compile=mode), on_cpu)) is not compiles


def test_passes_that_jobs_share_keep_nothing_and_draw_the_same(
    direct: Models, plain: Models
) -> None:
    kept: list[Any] = []
    hook = direct.unet.register_forward_hook(
        lambda *_: kept.append(direct.unet.direct_attention.kept)
    )
    jobs = [BASE, {**BASE, "prompt": "a green square", "num_inference_steps": 5}]
    pictures: dict[str, list[list[Image.Image]]] = {"direct": [], "plain": []}
    for name, models in (("direct", direct), ("plain", plain)):

        def draw(job: dict[str, Any], models: Models = models, name: str = name) -> None:
            pictures[name].append(drawn(job, models, shares_passes=True))

        to_begin = [[functools.partial(draw, job) for job in jobs]]
        draw_side_by_side(lambda _, to_begin=to_begin: to_begin.pop() if to_begin else [])  # type: ignore[misc]
    hook.remove()
    assert kept == [None] * 5
    for mine, theirs in zip(pictures["direct"], pictures["plain"], strict=True):
        assert mine[0].tobytes() == theirs[0].tobytes()


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SDXL's networks, on the meta device."""
    return meta_networks(write_configs(tmp_path_factory.mktemp("sdxl") / "model"))


@pytest.mark.parametrize(
    ("name", "bytes_a_token", "most_texts"), [("unet", 332_800, 5), ("refiner_unet", 208_896, 8)]
)
def test_what_is_kept_of_full_size_is_within_the_margin_of_a_batch_s_plan(
    name: str, bytes_a_token: int, most_texts: int, full_size: dict[str, Any]
) -> None:
    """In 16 bits; one picture with guidance has two texts."""
    unet = full_size[name].to(torch.float16)
    attend_directly(unet)
    options: dict[str, Any] = {"device": "meta", "dtype": torch.float16}
    assert MOST_KEPT_BYTES <= MARGIN_BYTES / 8
    for rows, chunks in ((1, 1), (2, 1), (2, 2), (5, 1), (6, 1), (8, 1), (3, 3), (32, 1), (2, 40)):
        states = torch.empty(rows, chunks * 77, unet.config.cross_attention_dim, **options)
        with text_keys_kept(unet):
            for module_name, module in unet.named_modules():
                if module_name.endswith("attn2"):
                    hidden_states = torch.empty(rows, 4, module.to_q.in_features, **options)
                    module(hidden_states, encoder_hidden_states=states)
            kept_bytes = sum(
                tensor.nbytes
                for _, _, *both in unet.direct_attention.kept.values()
                for tensor in both
            )
        fits = rows * chunks <= most_texts
        assert kept_bytes == (rows * chunks * 77 * bytes_a_token if fits else 0)


@torch.no_grad()
def test_states_too_large_to_be_kept_push_out_those_before(
    direct: Models, plain: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (inputs_of(direct.unet, 1, tokens) for tokens in (77, 154))
    needed = 77 * sum(module.out_features for module in projections(direct.unet)) * 4
    monkeypatch.setattr(direct_attention, "MOST_KEPT_BYTES", needed)
    with text_keys_kept(direct.unet):
        for inputs, is_kept in ((small, True), (large, False), (small, True)):
            assert torch.equal(direct.unet(**inputs)[0], plain.unet(**inputs)[0])
            assert bool(direct.unet.direct_attention.kept) is is_kept


@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"])
def test_a_unet_whose_attention_has_more_to_it_keeps_diffusers_own(mid: str, plain: Models) -> None:
    """Norms of its own, a sum with what came in, or another form of the text's."""
    down = "AttnDownBlock2D" if mid == "UNetMidBlock2DCrossAttn" else "DownBlock2D"
    form = {"down_block_types": (down, *plain.unet.config.down_block_types[1:])}
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(
            {**plain.unet.config, **form, "mid_block_type": mid}
        )
    attend_directly(unet)
    assert DirectAttention not in {type(one) for one in unet.attn_processors.values()}
    with text_keys_kept(unet):
        pass


def test_a_unet_that_has_another_processor_already_keeps_it() -> None:
    unet = fresh_models().unet
    unet.fuse_qkv_projections()
    attend_directly(unet)
    assert {type(one) for one in unet.attn_processors.values()} == {FusedAttnProcessor2_0}
