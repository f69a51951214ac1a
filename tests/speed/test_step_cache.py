"""The step cache: what it leaves out, what it leaves alone, and what it costs."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import memory as counted_memory
from benchmarks.flops import meta_networks, unet_inputs
from benchmarks.sdxl_architecture import write_configs
from benchmarks.ways import psnr_db
from sdxl_worker.drawing import batches
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.steps import Step
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.serving.report import build_report
from sdxl_worker.serving.start import start
from sdxl_worker.settings import Settings
from sdxl_worker.speed import step_cache as step_cache_module
from sdxl_worker.speed.optimize import MODES, optimizations_of
from sdxl_worker.speed.step_cache import step_cache
from shapes.judge import judge
from tests import inpainting_model
from tests.support import (
    PROMPT,
    SCHEDULERS,
    canvas_of,
    draw,
    largest_difference,
    models,
    noise_picture,
    picture,
)

JOB = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 5, "refiner_inference_steps": 8}
WAYS: dict[str, dict[str, Any]] = {
    "base": {"refiner_inference_steps": 0},
    "refined": {"strength": 0.5},
    "ensemble": {"high_noise_frac": 0.6},
}


def cached(interval: int | None = 2, **job: Any) -> list[Image.Image]:
    """The pictures of a job with a step cache."""
    return draw(parse_request({**JOB, **job}), models(), step_cache_interval=interval)


def plain(**job: Any) -> list[Image.Image]:
    """Those without."""
    return cached(None, **job)


@pytest.fixture
def deep_passes() -> Iterator[dict[str, int]]:
    """How often each network's deepest block really ran, and how often the network was called."""
    passes = dict.fromkeys(("base", "base deep", "refiner", "refiner deep"), 0)

    def count(name: str, *_: Any) -> None:
        passes[name] += 1

    hooks = []
    for name, unet in (("base", models().unet), ("refiner", models().refiner_unet)):
        assert unet is not None
        for network, what in (
            (unet, name),
            (unet.mid_block.resnets[0], f"{name} deep"),
        ):
            hooks.append(network.register_forward_hook(functools.partial(count, what)))
    yield passes
    for hook in hooks:
        hook.remove()


def test_it_is_off_unless_it_is_asked_for(
    deep_passes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings().step_cache is None
    monkeypatch.setattr(step_cache_module, "_kept_forward", lambda *_, **__: pytest.fail("on"))
    picture(**JOB)
    assert deep_passes["base"] == deep_passes["base deep"] == 5


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("mode", WAYS)
def test_each_stage_begins_with_a_deep_step_and_has_one_in_so_many(
    mode: str, interval: int, deep_passes: dict[str, int]
) -> None:
    cached(interval, **WAYS[mode])
    assert deep_passes["base"] > 0
    assert (deep_passes["refiner"] > 0) is (mode != "base")
    for stage in ("base", "refiner"):
        expected = math.ceil(deep_passes[stage] / interval)
        assert deep_passes[f"{stage} deep"] == expected


def test_each_batch_of_a_job_begins_anew(
    deep_passes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept of two pictures would not even fit the one that is left."""
    together = cached(num_images=3)
    deep_passes.update(dict.fromkeys(deep_passes, 0))
    monkeypatch.setattr(
        batches, "plan", lambda *_, **__: Plan(batch_size=2, slicing=False, tiling=False)
    )
    apart = cached(num_images=3)
    assert deep_passes["base deep"] == 2 * 3
    for one, other in zip(apart, together, strict=True):
        assert largest_difference(one, other) <= 1


def test_a_batch_gives_the_pictures_of_single_requests() -> None:
    batch = cached(num_images=2)
    for i, one in enumerate(batch):
        assert largest_difference(one, cached(seed=3 + i)[0]) <= 1


class StoppedError(Exception):
    """As a job that is cancelled ends."""


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_stopped_job_leaves_nothing_to_the_next(stopped_after: int) -> None:
    expected = cached()[0].tobytes()
    expected_plain = plain()[0].tobytes()

    def stop(step: Step) -> None:
        if step.step == stopped_after:
            raise StoppedError

    with pytest.raises(StoppedError):
        draw(parse_request({**JOB, "seed": 8}), models(), on_step=stop, step_cache_interval=2)
    assert cached()[0].tobytes() == expected
    assert plain()[0].tobytes() == expected_plain


def test_what_is_kept_is_let_go_of_before_the_picture_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keepers: list[dict[Any, Any]] = []
    kept_forward = step_cache_module._kept_forward

    def spied(block: Any, kept: dict[Any, Any], **options: Any) -> Callable[..., Any]:
        keepers.append(kept)
        return kept_forward(block, kept, **options)

    monkeypatch.setattr(step_cache_module, "_kept_forward", spied)
    held: list[int] = []
    hook = models().vae.decoder.register_forward_pre_hook(
        lambda *_: held.append(sum(map(len, keepers)))
    )
    try:
        for scheduler in SCHEDULERS:  # PNDM calls the UNet once more than it is asked to
            cached(scheduler=scheduler, num_inference_steps=3, height=64, width=64)
    finally:
        hook.remove()
    assert held == [0] * len(SCHEDULERS)
    assert keepers


@pytest.mark.parametrize("mode", WAYS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_way_still_draws_what_was_asked(scheduler: str, mode: str) -> None:
    job = {
        **WAYS[mode],
        "scheduler": scheduler,
        "num_inference_steps": 16,
        "refiner_inference_steps": 0 if mode == "base" else 16,
    }
    [drawn] = cached(**job)
    assert judge(drawn).matches(PROMPT)


def test_pictures_are_near_those_of_deep_steps_and_nearer_the_more_of_them_are_deep() -> None:
    job = {"num_inference_steps": 25, "num_images": 4}
    drawn = plain(**job)
    near, far = (psnr_db(cached(interval, **job), drawn) for interval in (2, 5))
    assert 99 > near > 20
    assert near > far


def test_without_guidance_it_works_as_well(deep_passes: dict[str, int]) -> None:
    """Half the batch."""
    [drawn] = cached(guidance_scale=1, num_inference_steps=16)
    assert deep_passes["base deep"] == 8
    assert psnr_db([drawn], plain(guidance_scale=1, num_inference_steps=16)) > 20


def test_without_a_refiner_it_works_as_well() -> None:
    alone = dataclasses.replace(models(), refiner_unet=None)
    without = {"refiner_inference_steps": 0}
    # Not asked for by name, so that the worker without a refiner leaves it out.
    request = {key: value for key, value in JOB.items() if key != "refiner_inference_steps"}
    [drawn] = draw(parse_request(request), alone, step_cache_interval=2)
    assert drawn.tobytes() == cached(**without)[0].tobytes()


def test_a_unet_for_inpainting_sees_the_mask_in_shallow_steps_too(tmp_path: Path) -> None:
    folder = inpainting_model.write(tmp_path / "model")
    loaded = load_models(find_model_dir(Settings(model_dir=folder)))
    hole = np.zeros((128, 128), bool)
    hole[32:96, 32:96] = True
    canvas = canvas_of(noise_picture(128, 128), hole)
    seen: list[torch.Tensor] = []
    loaded.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    job = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 20, "mask_url": "https://a.org/b"}
    request = parse_request({**job, "image_url": "https://a.org/a"})
    near = draw(request, loaded, canvas, step_cache_interval=2)
    assert len(seen) == 15
    for latents in seen:
        assert torch.equal(latents[0, 4].bool(), torch.from_numpy(hole[::8, ::8]))
        assert torch.equal(latents[:, 5:], seen[0][:, 5:])
    assert 99 > psnr_db(near, draw(request, loaded, canvas)) > 20


def test_sizes_that_the_networks_cannot_halve_are_drawn_too() -> None:
    assert cached(height=72, width=104)[0].size == (104, 72)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SDXL's networks, on the meta device."""
    return meta_networks(write_configs(tmp_path_factory.mktemp("sdxl") / "model"))


@pytest.mark.parametrize("name", ["unet", "refiner_unet"])
def test_it_needs_no_more_memory_than_deep_steps(
    name: str, full_size: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `batches.plan` need not know of it."""

    def empty(output: Any) -> Any:
        # All is on the meta device here, and counts.
        return tuple(map(empty, output)) if isinstance(output, tuple) else output.new_empty(0)

    monkeypatch.setattr(step_cache_module, "_without_memory", empty)
    unet = full_size[name]
    inputs = unet_inputs(unet, 2, 512, 512)

    def three_steps() -> None:
        with step_cache(SimpleNamespace(unet=unet, num_timesteps=9), 2):
            for _ in range(3):
                unet(**inputs)

    plain = counted_memory.peak_bytes(unet, lambda: unet(**inputs))
    assert counted_memory.peak_bytes(unet, three_steps) == plain


@pytest.mark.parametrize("mode", MODES)
def test_nothing_takes_a_unet_as_a_whole_beside_it(mode: Any) -> None:
    """A graph would replay a deep step for a shallow one, or the other way round."""
    on_gpu = Placement(torch.device("cuda"), torch.float16, resident=True)
    optimizations = optimizations_of(Settings(compile=mode, step_cache=2), on_gpu)
    assert optimizations == MODES[mode] - {"cuda_graphs", "compile_unet"}


def test_the_setting_reaches_pictures_reports_and_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plain = picture(**JOB)
    monkeypatch.setenv("STEP_CACHE", "3")
    lossy = picture(**JOB)
    assert lossy.tobytes() == cached(3)[0].tobytes() != plain.tobytes()
    assert json.loads(lossy.text["settings"]) == {"STEP_CACHE": 3}  # type: ignore[attr-defined]
    assert "settings" not in plain.text  # type: ignore[attr-defined]
    assert "STEP_CACHE: one step in 3 is a deep one" in caplog.text
    request = parse_request(JOB)
    report = build_report(
        request, models(), Settings(step_cache=3), [lossy], generate_ms=1, steps=1, there={}
    )
    assert report["step_cache"] == 3


def test_the_log_says_what_of_compile_does_not_go_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    settings = Settings(compile="graphs", step_cache=2)
    start(settings).result()
    assert "not beside it, of COMPILE: cuda_graphs" in caplog.text
