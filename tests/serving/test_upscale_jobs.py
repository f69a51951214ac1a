"""Jobs whose pictures are enlarged: by Lanczos or a network, in each mode, and stopped between two
tiles."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import handler
from sdxl_worker.drawing import enlarging
from sdxl_worker.drawing.enlarging import enlarger
from sdxl_worker.loading.upscalers import UpscalerFiles
from sdxl_worker.outputs import size_guard
from sdxl_worker.placement import Placement
from sdxl_worker.serving import fetching, turn
from sdxl_worker.serving import progress as progress_module
from sdxl_worker.serving.progress import Progress
from tests.own_files import write_lora
from tests.serving.conftest import Platform
from tests.small_upscalers import compact, write
from tests.support import (
    PROMPT,
    data_uri,
    difference,
    error,
    noise_picture,
    picture,
    pictures,
    replace_generate,
    run,
)

QUICK: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2}
BASE = {**QUICK, "height": 64, "width": 80, "refiner_inference_steps": 0}
SENT = noise_picture(88, 64)
URL = {"image_url": data_uri(SENT)}
NETWORK = {"upscaler": "small"}
LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upscalers")
    write(folder / "small.pth", compact(scale=2))
    write(folder / "for_noise.safetensors", compact(scale=1))
    (folder / "broken.pth").write_bytes(b"<html>not found</html>")
    write_lora(folder / "style.safetensors", seed=5)
    return folder


@pytest.fixture(autouse=True)
def _folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSCALER_DIR", str(folder))
    monkeypatch.setenv("LORA_DIR", str(folder))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def by_network(folder: Path, before: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    placement = Placement(torch.device("cpu"), torch.float32, resident=True)
    return enlarger(UpscalerFiles(folder / "small.pth").load(placement), placement)(before, size_px)


def test_finished_pictures_are_enlarged_by_lanczos_each_as_alone() -> None:
    before = pictures(**BASE, num_images=2)
    after = pictures(**BASE, num_images=2, upscale={"factor": 1.7})
    for small, large in zip(before, after, strict=True):
        assert same(large, small.resize((136, 109), LANCZOS))


def test_or_by_a_network(folder: Path) -> None:
    before = pictures(**BASE, num_images=2)
    after = pictures(**BASE, num_images=2, upscale={**NETWORK, "factor": 1.7})
    for small, large in zip(before, after, strict=True):
        assert same(large, by_network(folder, small, (136, 109)))


def test_a_picture_that_is_refined_and_one_that_stays_are_enlarged_too() -> None:
    for fields in ({"refiner_inference_steps": 4}, {"strength": 0}):
        before = picture(**QUICK, **URL, **fields)
        after = picture(**QUICK, **URL, **fields, upscale={})
        assert same(after, before.resize((176, 128), LANCZOS))
    assert same(after, SENT.resize((176, 128), LANCZOS))


def test_with_a_mask_what_is_enlarged_is_the_picture_with_what_was_put_back() -> None:
    mask = np.zeros((64, 88), np.uint8)
    mask[:32, :32] = 255
    job_input = {**QUICK, **URL, "mask_url": data_uri(Image.fromarray(mask)), "mask_padding": 8}
    before = picture(**job_input)
    assert same(picture(**job_input, upscale={}), before.resize((176, 128), LANCZOS))


def test_a_larger_second_pass_may_be_enlarged_once_more(folder: Path) -> None:
    job_input = {**BASE, "hires": {**NETWORK, "strength": 0.5}}
    before = picture(**job_input)
    assert before.size == (120, 96)
    assert difference(before, picture(**BASE, hires={"strength": 0.5})) > 0.2
    after = picture(**job_input, upscale={**NETWORK, "factor": 1.5})
    assert same(after, by_network(folder, before, (180, 144)))


def test_beside_a_lora_the_second_pass_is_drawn_with_it_and_it_leaves_nothing_behind() -> None:
    job_input = {**BASE, "hires": {"strength": 0.5}}
    plain, plain_and_larger = picture(**BASE), picture(**job_input)
    assert (
        difference(picture(**job_input, loras=[{"path": "style.safetensors"}]), plain_and_larger)
        > 0.2
    )
    assert same(picture(**job_input), plain_and_larger)
    assert same(picture(**BASE), plain)


def test_a_check_tells_the_size_that_comes_out() -> None:
    fields = {"hires": {"strength": 0.5}, "upscale": {"factor": 2}}
    report = run({**BASE, **fields, "check": True})
    assert (report["width"], report["height"], report["steps"]) == (240, 192, 3)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"upscale": {"upscaler": "large"}},
            "upscale.upscaler: this worker has no upscaler large; it has lanczos, broken, "
            "for_noise, small, style",
        ),
        (
            {"hires": {"upscaler": "large", "strength": 0.5}, "mode": "img2img"},
            "hires.upscaler: this worker has no upscaler large; it has lanczos, broken, "
            "for_noise, small, style",
        ),
    ],
)
def test_an_unknown_upscaler_is_told_before_anything_is_fetched(
    fields: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "fetch", lambda *_: pytest.fail("fetched"))
    assert error({**QUICK, "image_url": "https://example.com/a.png", **fields}) == problem


@pytest.mark.parametrize(("field", "more"), [("hires", {"strength": 0.5}), ("upscale", {})])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "for_noise",
            "for_noise.safetensors is a network for something else (Restoration), not an upscaler",
        ),
        (
            "broken",
            "the upscaler broken.pth cannot be loaded; the worker's owner should fetch it again",
        ),
    ],
)
def test_a_network_that_is_no_upscaler_is_refused_before_the_drawing_and_the_next_job_is_as_ever(
    field: str, more: dict[str, Any], name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = picture(**BASE)
    with monkeypatch.context() as without:
        replace_generate(without, lambda *_, **__: pytest.fail("drawn"))
        told = error({**BASE, field: {"upscaler": name, **more}})
    assert told == f"{field}.upscaler: {problem}"
    assert same(picture(**BASE), plain)


def test_sizes_that_only_the_picture_tells_are_refused_before_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turn, "_draw", lambda *_, **__: pytest.fail("drawn"))
    wide = {"image_url": data_uri(Image.new("RGB", (1600, 64)))}
    assert error({**QUICK, **wide, "upscale": {"factor": 3}}) == (
        "upscale.factor: 1600 x 64 would become 4800 x 192, and no side may be over 4096; 2.56 is "
        "the most that works"
    )
    larger = {
        "mode": "img2img",
        "hires": {"scale": 2, "strength": 0.5},
        "width": 2400,
        "height": 64,
    }
    assert error({**QUICK, **wide, **larger}).startswith("hires.scale: 2400 x 64 would become 4800")


def test_an_answer_that_is_sure_to_be_too_large_is_refused_before_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turn, "_draw", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr(size_guard, "limit_bytes", lambda _: 20_000)
    assert "would be at least" in error({**BASE, "upscale": {"factor": 4}})
    assert "would be at least" in error({**BASE, "hires": {"scale": 2, "strength": 0.5}})
    monkeypatch.undo()
    assert "images" in run(BASE)


def test_a_network_works_on_the_gpu_thread_and_lanczos_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upscaled = turn.upscaled
    threads: list[str] = []

    def recorded(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return upscaled(*args)

    monkeypatch.setattr(turn, "upscaled", recorded)
    picture(**BASE, upscale={})
    picture(**BASE, upscale=NETWORK)
    assert not threads[0].startswith("gpu")
    assert threads[1].startswith("gpu")


def test_the_tiles_of_all_pictures_are_told(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enlarging, "TILE_PX", 72)
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_UPDATES", 0.0)
    told: list[tuple[int, int]] = []
    on_tile = Progress.on_tile

    def recorded(progress: Progress, done: int, tiles: int) -> None:
        told.append((done, tiles))
        assert progress._wanted.wait(10), "the update before was sent"
        on_tile(progress, done, tiles)

    monkeypatch.setattr(Progress, "on_tile", recorded)
    run({**BASE, "num_images": 2, "upscale": {**NETWORK, "factor": 1.5}})
    tiles = 2 * 10
    assert told == [(i + 1, tiles) for i in range(tiles)]
    updates = [body["output"]["progress"] for _, _, body in platform.updates]
    assert {"stage": "upscale", "step": 5, "steps": tiles, "percent": 25} in updates


def test_a_job_that_is_stopped_ends_between_two_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enlarging, "TILE_PX", 72)
    plain = picture(**BASE)
    told: list[int] = []
    stopped, on_tile = threading.Event(), Progress.on_tile

    def recorded(progress: Progress, done: int, tiles: int) -> None:
        told.append(done)
        assert stopped.wait(30)
        on_tile(progress, done, tiles)

    monkeypatch.setattr(Progress, "on_tile", recorded)

    async def stop_one() -> dict[str, Any]:
        running = asyncio.create_task(
            handler.handler({"id": "a", "input": {**BASE, "upscale": NETWORK}})
        )
        while not told:
            await asyncio.sleep(0.005)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        stopped.set()
        return await handler.handler({"id": "b", "input": BASE})

    output = asyncio.run(stop_one())
    assert told == [1]
    assert "images" in output
    assert same(picture(**BASE), plain)
