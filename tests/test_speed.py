"""Fast, and the same picture: each optimization against the plain path, where a CPU can tell."""

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ways import psnr_db
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.generate import generate
from sdxl_worker.gpu import StepsAhead
from sdxl_worker.loading import models as models_module
from sdxl_worker.loading.models import Models
from sdxl_worker.loading.weights import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings
from sdxl_worker.speed import cuda_graphs, gpu, memory
from sdxl_worker.speed.optimize import MODES, STEPS, steps_of
from tests.support import (
    JOB,
    REQUESTS,
    SCHEDULERS,
    fresh_models,
    largest_difference,
    models,
    optimize_models,
    weights_being_read,
)

# --- nothing waits for the GPU -------------------------------------------------------------------


class CopiesFromHost(TorchDispatchMode):
    """Counts tensors that go from the host to the device: on a GPU each such copy waits for it,
    unless it was queued from pinned memory."""

    count = 0

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self._pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_meta and "_to_copy" in str(func):
            pinned = any(args[0] is tensor for tensor in self._pinned)
            queued = pinned and kwargs.get("non_blocking", False)
            self.count += not args[0].is_meta and not queued
        return out


@pytest.fixture(scope="module")
def on_meta() -> Models:
    """Models on the meta device, which raises at any attempt to read a number from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_module, "fit_preview_map", lambda *_: None)
        return fresh_models("meta", torch.float16)


@pytest.fixture
def without_memory(on_meta: Models, monkeypatch: pytest.MonkeyPatch) -> Models:
    monkeypatch.setattr(generate_module, "_to_pictures", lambda images: [tuple(images.shape)])
    return on_meta


@pytest.mark.filterwarnings("ignore:`upcast_vae`")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", REQUESTS)
def test_no_step_waits_for_the_gpu(
    mode: str, scheduler: str, without_memory: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads from the device or copies to it makes the host wait for all steps so far."""
    request = parse_request({**REQUESTS[mode], "scheduler": scheduler})
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    copies = []
    with CopiesFromHost(pinned) as from_host:
        shapes: Any = generate(
            request, without_memory, on_step=lambda _: copies.append(from_host.count)
        )
    assert shapes == [(1, 3, 128, 128)]
    increases = [after - before for before, after in itertools.pairwise(copies)]
    # Between base and refiner, a few tensors go over.
    assert sum(increase > 0 for increase in increases) <= (mode != "base")


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


def test_the_host_is_held_back_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[StepsAhead] = []
    monkeypatch.setattr(StepsAhead, "limit", lambda steps_ahead: held.append(steps_ahead))
    steps: list[Any] = []
    generate(parse_request(REQUESTS["refined"]), models(), on_step=steps.append)
    assert len(held) == len(steps) > 4


def test_pictures_leave_the_gpu_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []
    copy = torch.Tensor.cpu

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor)
        return copy(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    generate_module._to_pictures(torch.rand(2, 3, 8, 8))
    assert [(tensor.dtype, tensor.is_contiguous()) for tensor in copied] == [(torch.uint8, True)]


# --- each step of `optimize` ---------------------------------------------------------------------


def test_every_step_of_the_modes_exists() -> None:
    assert set.union(*map(set, MODES.values())) <= set(STEPS)
    assert all("channels_last" in steps for steps in MODES.values())


@pytest.mark.parametrize("mode", [None, "graphs", "blocks", "full"])
def test_a_worker_takes_only_what_its_machine_can_do(mode: Any) -> None:
    on_cpu = Placement(torch.device("cpu"), torch.float32, resident=True)
    on_gpu = dataclasses.replace(on_cpu, device=torch.device("cuda"))
    offloaded = dataclasses.replace(on_gpu, resident=False)
    assert not {"channels_last", "cuda_graphs"} & set(steps_of(Settings(compile=mode), on_cpu))
    assert set(steps_of(Settings(compile=mode), on_gpu)) == MODES[mode]
    assert not {"cuda_graphs", "compile_unet"} & set(steps_of(Settings(compile=mode), offloaded))
    assert "fuse_qkv" not in MODES[mode], "LoRA would be left out"


@pytest.mark.parametrize("mode", REQUESTS)
def test_offloaded_networks_draw_the_same_job_after_job(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from the host to the host: what is seen is that each network comes before its turn."""
    weights = weights_being_read()
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


def test_a_unet_leaves_before_the_decoder_comes_also_after_the_refiner_s_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decoder is in the chains of both pipelines, and hooks go with the last that was set."""
    weights = weights_being_read()
    weights.placement = dataclasses.replace(weights.placement, resident=False)
    offloaded = models_module.load(weights)
    generate(parse_request(REQUESTS["refined"]), offloaded)
    before_decoder: list[Any] = []
    decode = offloaded.base.vae.decode

    def noted(*args: Any, **kwargs: Any) -> Any:
        before_decoder.append(offloaded.base.vae._hf_hook.prev_module_hook.model)
        return decode(*args, **kwargs)

    monkeypatch.setattr(offloaded.base.vae, "decode", noted)
    generate(parse_request(REQUESTS["base"]), offloaded)
    assert before_decoder == [offloaded.base.unet]


@pytest.mark.parametrize("step", ["channels_last", "fuse_qkv"])
@pytest.mark.parametrize("mode", REQUESTS)
def test_a_step_leaves_the_picture_the_same(step: str, mode: str) -> None:
    request = parse_request({**REQUESTS[mode], "num_images": 2})
    optimized = fresh_models()
    optimize_models(optimized, [step])
    changed = generate(request, optimized)
    assert psnr_db(changed, generate(request, models())) > 45


def test_steps_change_the_networks() -> None:
    """So that the comparison above is one."""
    optimized = fresh_models()
    optimize_models(optimized, ["channels_last", "fuse_qkv"])
    convolution = optimized.base.unet.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not models().base.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    decoders = optimized.base.vae.decoder.conv_in.weight
    assert decoders.is_contiguous(memory_format=torch.channels_last)
    assert any(name.endswith("to_qkv") for name, _ in optimized.base.unet.named_modules())


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
    decoded: list[int] = []

    def on_step(step: generate_module.Step) -> None:
        steps.append(step)
        batches.append(step.latents().shape[0])

    decoder = models().base.vae.decoder
    hook = decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0].shape[0]))
    apart = generate(request, models(), on_step=on_step)
    hook.remove()
    assert decoded == [1] * 5
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
    recorded_bytes: float = 0,
    moved_in_bytes: float = 0,
) -> Plan:
    """What is planned in float16 for a GPU with so much to spare.

    Args:
        recorded_bytes: that CUDA graphs keep; not in what is to spare.
    """
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_bytes) - 100, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500 + int(recorded_bytes))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 400)
    monkeypatch.setattr(cuda_graphs, "idle_bytes", lambda: int(recorded_bytes))
    return memory.plan(
        torch.device("cuda"),
        torch.float16,
        num_images=num_images,
        pixels=pixels,
        decoder_dtype=decoder_dtype,
        moved_in_bytes=int(moved_in_bytes),
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


@pytest.mark.parametrize(
    ("free_gb", "recorded_gb", "expected"),
    [
        # Without a recording, this room would do for eight pictures, decoded together.
        (14.5, 0, Plan(8, slicing=False, tiling=False)),
        (14.5, 0.4, Plan(8, slicing=True, tiling=False)),
        # The eight have been recorded before: nothing more goes.
        (14.5, 3.2, Plan(8, slicing=False, tiling=False)),
        # Beside the recording, there is to be room for one picture's decoding.
        (4.5, 0.4, Plan(5, slicing=True, tiling=False)),
        (4.5, 0, Plan(8, slicing=True, tiling=False)),
    ],
)
def test_the_decoder_has_no_use_of_what_recordings_keep(
    free_gb: float, recorded_gb: float, expected: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_on_gpu(
        free_gb * 1e9,
        monkeypatch,
        num_images=8,
        pixels=MEGAPIXEL,
        recorded_bytes=recorded_gb * 1e9,
    )
    assert planned == expected


def test_a_unet_that_moves_in_takes_room_from_its_pictures_and_leaves_it_to_the_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = plan_on_gpu(7.5e9, monkeypatch, num_images=8, pixels=MEGAPIXEL, moved_in_bytes=5.1e9)
    assert planned == Plan(3, slicing=False, tiling=False)


def test_memory_that_recordings_keep_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_graphs.idle_bytes() == 0, "before the first recording"
    segments = [
        {"total_size": 100, "allocated_size": 30},
        {"total_size": 50, "allocated_size": 50},
    ]
    shared = cuda_graphs._shared
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(
        torch.cuda, "memory_snapshot", lambda pool, **_: segments if pool == (0, 7) else []
    )
    monkeypatch.setattr(cuda_graphs, "_shared", functools.cache(shared.__wrapped__))
    cuda_graphs._shared()
    assert cuda_graphs.idle_bytes() == 70
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    assert gpu.peak_memory_bytes() == 1070


def test_tiles_are_smaller_than_a_native_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would be of no help, as diffusers has them by itself."""
    fresh = fresh_models()
    request = parse_request(REQUESTS["base"])
    [whole] = generate(request, fresh)
    monkeypatch.setattr(
        memory, "plan", lambda *_, **__: Plan(batch_size=1, slicing=False, tiling=True)
    )
    sides: list[int] = []
    fresh.base.vae.decoder.register_forward_pre_hook(
        lambda _, inputs: sides.append(max(inputs[0].shape[-2:]))
    )
    [tiled] = generate(request, fresh)
    assert tiled.size == whole.size
    assert len(sides) > 1
    assert max(sides) == fresh.base.default_sample_size // 2
    assert psnr_db([tiled], [whole]) > 25


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "decoder_dtype"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_the_plan_knows_what_the_decoder_computes_in(
    dtype: torch.dtype,
    force_upcast: bool,
    decoder_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[torch.dtype] = []

    def plan(*_: Any, **options: Any) -> Plan:
        planned.append(options["decoder_dtype"])
        raise RuntimeError("planned")

    narrow = fresh_models(dtype=dtype)
    narrow.base.vae.register_to_config(force_upcast=force_upcast)
    monkeypatch.setattr(memory, "plan", plan)
    with pytest.raises(RuntimeError, match="planned"):
        generate(parse_request(REQUESTS["base"]), narrow)
    assert planned == [decoder_dtype]


def test_on_a_cpu_all_pictures_are_one_batch() -> None:
    planned = memory.plan(
        torch.device("cpu"),
        torch.float32,
        num_images=8,
        pixels=MEGAPIXEL,
        decoder_dtype=torch.float32,
    )
    assert planned == Plan(8, slicing=False, tiling=False)
