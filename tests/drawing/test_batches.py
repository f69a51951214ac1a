"""As many pictures at once as fit."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.ways import psnr_db
from sdxl_worker.drawing import batches
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.steps import Step
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from tests.support import (
    REQUESTS,
    draw,
    fresh_models,
    largest_difference,
    models,
)


@pytest.mark.parametrize("mode", REQUESTS)
def test_pictures_are_the_same_in_batches_that_fit(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = parse_request({**REQUESTS[mode], "num_images": 5})
    together = draw(request, models())
    sizes: list[int] = []
    monkeypatch.setattr(
        batches, "plan", lambda *_, **__: Plan(batch_size=2, slicing=True, tiling=False)
    )
    steps: list[Step] = []
    decoded: list[int] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        sizes.append(step.latents().shape[0])

    decoder = models().vae.decoder
    hook = decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0].shape[0]))
    apart = draw(request, models(), on_step=on_step)
    hook.remove()
    assert decoded == [1] * 5
    assert len(apart) == 5
    for one, other in zip(apart, together, strict=True):
        assert largest_difference(one, other) <= 1
    assert set(sizes) == {1, 2}
    percents = [step.percent for step in steps]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert percents[len(percents) // 2] < 75


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
        moved_in_bytes: of the larger UNet, where networks come from the host for their turn.
    """
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_bytes) - 100, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500 + int(recorded_bytes))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 400)
    monkeypatch.setattr(batches, "idle_graph_bytes", lambda: int(recorded_bytes))
    vae: Any = SimpleNamespace(
        dtype=torch.float16, config=SimpleNamespace(force_upcast=decoder_dtype == torch.float32)
    )
    models_there = dataclasses.replace(
        models(),
        placement=Placement(torch.device("cuda"), torch.float16, resident=not moved_in_bytes),
        vae=vae,
        unet=unet_of(int(moved_in_bytes)),
        refiner_unet=unet_of(int(moved_in_bytes) // 2),
    )
    return batches.plan(models_there, num_images=num_images, pixels=pixels)


def unet_of(size_bytes: int) -> Any:
    return SimpleNamespace(get_memory_footprint=lambda: size_bytes)


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


def test_tiles_are_smaller_than_a_native_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would be of no help, as diffusers has them by itself."""
    fresh = fresh_models()
    request = parse_request(REQUESTS["base"])
    [whole] = draw(request, fresh)
    monkeypatch.setattr(
        batches, "plan", lambda *_, **__: Plan(batch_size=1, slicing=False, tiling=True)
    )
    sides: list[int] = []
    fresh.vae.decoder.register_forward_pre_hook(
        lambda _, inputs: sides.append(max(inputs[0].shape[-2:]))
    )
    [tiled] = draw(request, fresh)
    assert tiled.size == whole.size
    assert len(sides) > 1
    assert max(sides) == fresh.unet.config.sample_size // 2
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

    def plan(models_there: Models, **_: Any) -> Plan:
        planned.append(batches.decoder_dtype(models_there.vae))
        raise RuntimeError("planned")

    narrow = fresh_models(dtype=dtype)
    narrow.vae.register_to_config(force_upcast=force_upcast)
    monkeypatch.setattr(batches, "plan", plan)
    with pytest.raises(RuntimeError, match="planned"):
        draw(parse_request(REQUESTS["base"]), narrow)
    assert planned == [decoder_dtype]


def test_on_a_cpu_all_pictures_are_one_batch() -> None:
    assert models().device.type == "cpu"
    planned = batches.plan(models(), num_images=8, pixels=MEGAPIXEL)
    assert planned == Plan(8, slicing=False, tiling=False)
