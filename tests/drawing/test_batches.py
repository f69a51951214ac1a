"""As many pictures at once as fit."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.ways import psnr_db
from sdxl_worker import gpu
from sdxl_worker.drawing import batches
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.image_prompts import ImagePrompt
from sdxl_worker.drawing.steps import Step
from sdxl_worker.errors import RequestError
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.speed.cuda_graphs import GraphedForward
from tests.control_networks import control, draw_controlled
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


def models_on_gpu(
    free_bytes: float,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dtype: torch.dtype = torch.float16,
    decoder_dtype: torch.dtype = torch.float16,
    recorded_bytes: float | None = None,
    moved_in_bytes: float = 0,
) -> Models:
    """As they are to a plan, on a GPU with so much to spare.

    Args:
        recorded_bytes: that CUDA graphs keep; not in what is to spare. None: there are no graphs.
        moved_in_bytes: of the larger UNet, where networks come from the host for their turn.
    """
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_bytes) - 100, 0))
    idle_bytes = int(recorded_bytes or 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500 + idle_bytes)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 400)
    monkeypatch.setattr(gpu, "idle_graph_bytes", lambda: idle_bytes)
    vae: Any = SimpleNamespace(
        dtype=torch.float16, config=SimpleNamespace(force_upcast=decoder_dtype == torch.float32)
    )
    return dataclasses.replace(
        models(),
        placement=Placement(torch.device("cuda"), dtype, resident=not moved_in_bytes),
        vae=vae,
        unet=unet_of(int(moved_in_bytes), graphed=recorded_bytes is not None),
        refiner_unet=unet_of(int(moved_in_bytes) // 2),
    )


def plan_on_gpu(
    free_bytes: float,
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_images: int,
    pixels: int,
    encodes: bool = False,
    **there: Any,
) -> Plan:
    models_there = models_on_gpu(free_bytes, monkeypatch, **there)
    return batches.plan(models_there, num_images=num_images, pixels=pixels, encodes=encodes)


def unet_of(size_bytes: int, *, graphed: bool = False) -> Any:
    forward: Any = GraphedForward(lambda: None, torch.device("cuda")) if graphed else None
    return SimpleNamespace(get_memory_footprint=lambda: size_bytes, forward=forward)


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


def test_of_all_jobs_as_many_are_drawn_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = (
        plan_on_gpu(12e9, monkeypatch, num_images=count, pixels=4 * MEGAPIXEL) for count in (1, 8)
    )
    assert (one.batch_size, many.batch_size) == (1, 6)
    assert one.most_at_once == many.most_at_once == 6
    tight = plan_on_gpu(0.5e9, monkeypatch, num_images=8, pixels=MEGAPIXEL)
    assert tight.most_at_once == 1


def test_a_decoder_that_runs_in_32_bits_needs_twice_the_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype, slicing in ((torch.float32, True), (torch.float16, False)):
        planned = plan_on_gpu(
            20e9, monkeypatch, num_images=8, pixels=MEGAPIXEL, decoder_dtype=dtype
        )
        assert planned.slicing is slicing


@pytest.mark.parametrize(
    ("free_gb", "decoder_dtype", "recorded_gb", "is_tiled"),
    [
        (2.6, torch.float16, 0, False),
        (2.3, torch.float16, 0, True),
        # A VAE that has to run in 32 bits needs twice the room to encode, too.
        (2.6, torch.float32, 0, True),
        (3.9, torch.float32, 0, False),
        # What recordings keep is of no use to the encoder.
        (2.3, torch.float16, 2, True),
        # What they will keep as well is not there yet when a picture is encoded.
        (2.6, torch.float16, 0.1, False),
    ],
)
def test_a_picture_is_encoded_in_tiles_only_where_it_must(
    free_gb: float,
    decoder_dtype: torch.dtype,
    recorded_gb: float,
    is_tiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(*, encodes: bool) -> Plan:
        return plan_on_gpu(
            free_gb * 1e9,
            monkeypatch,
            num_images=1,
            pixels=MEGAPIXEL,
            encodes=encodes,
            decoder_dtype=decoder_dtype,
            recorded_bytes=recorded_gb * 1e9,
        )

    assert planned(encodes=True).encoding_tiled is is_tiled
    assert planned(encodes=False).encoding_tiled is False
    assert dataclasses.replace(planned(encodes=True), encoding_tiled=False) == planned(
        encodes=False
    )


def test_smaller_plans_change_nothing_about_encoding() -> None:
    plan: Plan | None = Plan(3, slicing=True, tiling=False, encoding_tiled=True)
    seen: list[Plan] = []
    while plan := plan.smaller() if plan else None:
        seen.append(plan)
    assert seen == [
        Plan(1, slicing=False, tiling=False, encoding_tiled=True),
        Plan(1, slicing=False, tiling=True, encoding_tiled=True),
    ]


def check_fits_on_gpu(
    free_gb: float,
    side_px: int,
    monkeypatch: pytest.MonkeyPatch,
    job_input: dict[str, Any] | None = None,
    **there: Any,
) -> None:
    request = parse_request({"prompt": "a red circle", **(job_input or {})})
    models_there = models_on_gpu(free_gb * 1e9, monkeypatch, **there)
    batches.check_fits(models_there, request, width_px=side_px, height_px=side_px)


def test_a_size_that_surely_does_not_fit_is_refused_with_the_largest_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RequestError) as caught:
        check_fits_on_gpu(4, 4096, monkeypatch)
    assert str(caught.value) == (
        "height, width: 4096 x 4096 pixels do not fit the memory of this worker's GPU; the "
        "largest square that does is 2776 x 2776"
    )
    # It is planned for in one piece, but for the decoder.
    check_fits_on_gpu(4, 2776, monkeypatch)
    planned = plan_on_gpu(4e9, monkeypatch, num_images=2, pixels=2776 * 2776)
    assert planned == Plan(1, slicing=False, tiling=True)


@pytest.mark.parametrize(
    ("free_gb", "job_input", "there", "fits"),
    [
        (5.4, {}, {}, True),  # in doubt: 0.1 GB beside one pass of the base
        (5.2, {}, {}, False),
        # Half the work needs half the memory.
        (2.7, {"guidance_scale": 1}, {}, True),
        (2.6, {"guidance_scale": 1}, {}, False),
        (5.4, {}, {"dtype": torch.float32}, False),
        (10.6, {}, {"dtype": torch.float32}, True),
        # Recordings are given up for a pass that needs their memory.
        (4.4, {}, {"recorded_bytes": 1e9}, True),
        # The smaller UNet has to be there, at least.
        (7.9, {}, {"moved_in_bytes": 5e9}, True),
        (7.7, {}, {"moved_in_bytes": 5e9}, False),
    ],
)
def test_what_is_in_doubt_is_tried(
    free_gb: float,
    job_input: dict[str, Any],
    there: dict[str, Any],
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fits:
        check_fits_on_gpu(free_gb, 4096, monkeypatch, job_input, **there)
    else:
        with pytest.raises(RequestError, match=r"^height, width: 4096 x 4096 .* \d+ x \d+$"):
            check_fits_on_gpu(free_gb, 4096, monkeypatch, job_input, **there)


def test_a_picture_that_keeps_its_size_is_told_by_its_own_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = {"image_url": "https://example.com/a.png"}
    with pytest.raises(RequestError, match="^image_url: 4096 x 4096 pixels do not fit"):
        check_fits_on_gpu(4, 4096, monkeypatch, picture)
    with pytest.raises(RequestError, match="^height, width: 4096 x 4096 pixels do not fit"):
        check_fits_on_gpu(4, 4096, monkeypatch, picture | {"mode": "img2img"})


def test_what_makes_it_too_large_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="^hires.scale: 4096 x 4096 pixels do not fit"):
        check_fits_on_gpu(4, 4096, monkeypatch, {"hires": {"scale": 1.1}})
    with pytest.raises(RequestError, match="^height, width: 4096 x 4096 pixels do not fit"):
        check_fits_on_gpu(4, 4096, monkeypatch, {"hires": {"scale": 1}})


def test_where_no_size_fits_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is not what is wrong: drawing says what is."""
    check_fits_on_gpu(0, 64, monkeypatch)


def test_on_a_cpu_every_size_is_tried() -> None:
    request = parse_request({"prompt": "a red circle"})
    batches.check_fits(models(), request, width_px=10**6, height_px=10**6)


@pytest.mark.parametrize(
    ("free_gb", "recorded_gb", "expected"),
    [
        # Without recordings, this room would do for eight pictures, decoded together.
        (14.5, None, Plan(8, slicing=False, tiling=False)),
        # One that is to be made counts before there is any.
        (14.5, 0, Plan(8, slicing=True, tiling=False)),
        (14.5, 0.4, Plan(8, slicing=True, tiling=False)),
        # The eight have been recorded before: nothing more goes.
        (14.5, 3.2, Plan(8, slicing=False, tiling=False)),
        # Beside the recording, there is to be room for one picture's decoding.
        (4.5, 0.4, Plan(5, slicing=True, tiling=False)),
        (4.5, 0, Plan(4, slicing=True, tiling=False)),
        (4.5, None, Plan(8, slicing=True, tiling=False)),
    ],
)
def test_the_decoder_has_no_use_of_what_recordings_keep(
    free_gb: float, recorded_gb: float | None, expected: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_on_gpu(
        free_gb * 1e9,
        monkeypatch,
        num_images=8,
        pixels=MEGAPIXEL,
        recorded_bytes=None if recorded_gb is None else recorded_gb * 1e9,
    )
    assert planned == expected


def test_a_unet_that_moves_in_takes_room_from_its_pictures_and_leaves_it_to_the_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = plan_on_gpu(7.5e9, monkeypatch, num_images=8, pixels=MEGAPIXEL, moved_in_bytes=5.1e9)
    assert planned == Plan(3, slicing=False, tiling=False)


def with_networks(*sizes_gb: float) -> list[Any]:
    """Controls, each of a network of its own."""
    return [
        dataclasses.replace(control(), network=unet_of(int(size_gb * 1e9))) for size_gb in sizes_gb
    ]


def test_what_controlnets_add_takes_room_from_the_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models_there = models_on_gpu(11.5e9, monkeypatch)
    options: dict[str, Any] = {"num_images": 8, "pixels": 4 * MEGAPIXEL}
    assert batches.plan(models_there, **options).batch_size == 6
    for controls in (with_networks(2.5), with_networks(2.5, 2.5, 2.5)):  # in memory already
        assert batches.plan(models_there, **options, controls=controls).batch_size == 5


def test_networks_that_take_turns_make_room_for_the_controlnets_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models_there = models_on_gpu(7.5e9, monkeypatch, moved_in_bytes=5.1e9)
    request = parse_request({"prompt": "a red circle"})
    [small] = with_networks(0.4)
    options: dict[str, Any] = {"num_images": 8, "pixels": MEGAPIXEL}
    assert batches.plan(models_there, **options).batch_size == 3
    assert batches.plan(models_there, **options, controls=[small]).batch_size == 2
    assert batches.plan(models_there, **options, controls=[small, small]).batch_size == 2
    size: dict[str, Any] = {"width_px": 3072, "height_px": 3072}
    batches.check_fits(models_there, request, **size, controls=[small])
    with pytest.raises(RequestError, match="3072 x 3072 pixels do not fit"):
        batches.check_fits(models_there, request, **size, controls=with_networks(1.2))


def test_and_for_the_ip_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    models_there = models_on_gpu(7.5e9, monkeypatch, moved_in_bytes=5.1e9)
    request = parse_request({"prompt": "a red circle"})
    small, large = with_adapter(0.4), with_adapter(1.2)
    options: dict[str, Any] = {"num_images": 8, "pixels": MEGAPIXEL}
    assert batches.plan(models_there, **options).batch_size == 3
    assert batches.plan(models_there, **options, image_prompts=[small]).batch_size == 2
    assert batches.plan(models_there, **options, image_prompts=[small, small]).batch_size == 2
    size: dict[str, Any] = {"width_px": 3584, "height_px": 3584}
    batches.check_fits(models_there, request, **size, image_prompts=[small])
    with pytest.raises(RequestError, match="3584 x 3584 pixels do not fit"):
        batches.check_fits(models_there, request, **size, image_prompts=[large])


def with_adapter(size_gb: float) -> ImagePrompt:
    adapter: Any = torch.nn.Linear(1, 1, bias=False, device="meta")
    adapter.weight = torch.nn.Parameter(torch.empty(int(size_gb * 1e9 / 4), device="meta"))
    return ImagePrompt(adapter, torch.zeros(2, 1, 4, 8), "plain", 0.8)


def test_a_size_that_surely_does_not_fit_with_a_controlnet_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = parse_request({"prompt": "a red circle"})
    models_there = models_on_gpu(5.4e9, monkeypatch)
    size: dict[str, Any] = {"width_px": 4096, "height_px": 4096}
    batches.check_fits(models_there, request, **size)
    with pytest.raises(RequestError, match="largest square that does is 3168 x 3168"):
        batches.check_fits(models_there, request, **size, controls=with_networks(2.5))


def test_a_job_with_controls_is_planned_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def note(plan: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            given.append(len(options["controls"]))
            return plan(*arguments, **options)

        return noted

    monkeypatch.setattr(batches, "plan", note(batches.plan))
    monkeypatch.setattr(batches, "check_fits", note(batches.check_fits))
    request = parse_request({**REQUESTS["base"], "height": 64, "width": 64})
    draw_controlled(request, models(), [control()])
    assert given == [1, 1]


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
