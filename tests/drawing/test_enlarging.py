"""Pictures become larger: the tiles do not show, and what goes wrong never does."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_worker.drawing import enlarging, second_tries
from sdxl_worker.drawing.enlarging import enlarger
from sdxl_worker.errors import PictureError
from sdxl_worker.loading.upscalers import Upscaler, UpscalerFiles
from sdxl_worker.placement import Placement
from tests.small_upscalers import compact, write
from tests.support import largest_difference

CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


def colours(width: int, height: int) -> Image.Image:
    """Smooth ones with some noise, the same each time."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noise = random.normal(0, 12, (height, width, 3))
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


PICTURE = colours(300, 210)


def network_of(
    tensors: dict[str, torch.Tensor], tmp_path: Path, placement: Placement = CPU
) -> Upscaler:
    network = UpscalerFiles(write(tmp_path / "small.safetensors", tensors)).load(placement)
    assert isinstance(network, Upscaler)
    return network


@pytest.fixture
def network(tmp_path: Path) -> Upscaler:
    return network_of(compact(scale=2), tmp_path)


def at_once(network: Upscaler, picture: Image.Image) -> Image.Image:
    """What it makes of the whole picture."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        larger = network(pixels)
    assert larger is not None
    array = (larger[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    return Image.fromarray(array.numpy())


def sizes_seen(network: Upscaler) -> list[tuple[int, int]]:
    """Filled with the width and height of what it gets."""
    seen: list[tuple[int, int]] = []
    network.network.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].shape[3], inputs[0].shape[2]))
    )
    return seen


def test_lanczos_is_that_of_pillow() -> None:
    expected = PICTURE.resize((450, 333), Image.Resampling.LANCZOS)
    assert enlarger(None, CPU)(PICTURE, (450, 333)) == expected


def test_a_network_makes_more_of_a_picture_than_lanczos(network: Upscaler) -> None:
    assert enlarger(network, CPU)(PICTURE, (600, 420)) == at_once(network, PICTURE)
    assert largest_difference(at_once(network, PICTURE), PICTURE.resize((600, 420))) > 20


@pytest.mark.parametrize("size", [(600, 420), (450, 315), (301, 211), (449, 333), (1200, 840)])
def test_tiles_give_the_picture_of_one_pass_and_lanczos(
    network: Upscaler, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = at_once(network, PICTURE)
    for once in ((size[0], expected.height), size):
        expected = expected.resize(once, Image.Resampling.LANCZOS)
    monkeypatch.setattr(enlarging, "TILE_PX", 128)
    seen = sizes_seen(network)
    assert largest_difference(enlarger(network, CPU)(PICTURE, size), expected) <= 1
    assert len(seen) == 5 * 4
    assert max(map(max, seen)) <= 128 + 2, "and rounding"


def test_a_network_never_gets_more_than_a_tile(network: Upscaler) -> None:
    seen = sizes_seen(network)
    enlarger(network, CPU)(Image.new("RGB", (1100, 513)), (2200, 1026))
    assert len(seen) == 3 * 2
    assert max(map(max, seen)) <= 512
    seen.clear()
    enlarger(network, CPU)(Image.new("RGB", (512, 512)), (1024, 1024))
    assert seen == [(512, 512)]


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (65, 20)])
def test_small_pictures_are_enlarged_too(network: Upscaler, size: tuple[int, int]) -> None:
    picture = colours(*size)
    larger = (2 * size[0], 2 * size[1])
    assert enlarger(network, CPU)(picture, larger) == at_once(network, picture)


def test_a_network_that_takes_certain_sizes_gets_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAFMN: multiples of 8, and float32 alone."""
    UpscalerFiles(write(tmp_path / "any.pth", compact())).load(CPU)  # imports spandrel
    torch.manual_seed(0)
    kind = importlib.import_module("spandrel.architectures.SAFMN").SAFMN
    tensors = kind(dim=8, n_blocks=1, upscaling_factor=2).state_dict()
    half = Placement(torch.device("cpu"), torch.float16, resident=True)
    network = network_of(tensors, tmp_path, half)
    assert network.dtype == torch.float32
    seen = sizes_seen(network)
    monkeypatch.setattr(enlarging, "TILE_PX", 128)
    larger = enlarger(network, half)(PICTURE, (601, 421))
    assert larger.size == (601, 421)
    assert len(seen) == 5 * 4
    assert not any(side % 8 for size in seen for side in size)


def test_where_half_precision_overflows_the_picture_is_that_of_float32(tmp_path: Path) -> None:
    tensors = compact()
    for name, factor in (("body.0", 1e4), ("body.2", 1e2), ("body.4", 1e-6)):
        tensors[f"{name}.weight"] *= factor
    for name, factor in (("body.0", 1e4), ("body.2", 1e4)):
        tensors[f"{name}.bias"] *= factor
    assert all(tensor.half().isfinite().all() for tensor in tensors.values())
    half = Placement(torch.device("cpu"), torch.float16, resident=True)
    expected = at_once(network_of(tensors, tmp_path), PICTURE)
    network = network_of(tensors, tmp_path, half)
    before = second_tries.COUNTS["enlarged in float32"]
    got = enlarger(network, half)(PICTURE, (600, 420))
    assert second_tries.COUNTS["enlarged in float32"] == before + 1
    assert largest_difference(got, expected) <= 4, "but for rounded weights"
    assert network.dtype == torch.float16, "nothing stays"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_network_without_numbers_gives_an_error_and_no_picture(
    tmp_path: Path, number: float
) -> None:
    tensors = compact()
    tensors["body.4.bias"][0] = number  # spandrel would make white of what is infinite
    with pytest.raises(PictureError, match="^the upscaler small.safetensors gave no picture"):
        enlarger(network_of(tensors, tmp_path), CPU)(PICTURE, (600, 420))


def test_what_does_not_fit_is_tried_in_smaller_tiles(
    network: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = at_once(network, PICTURE)
    monkeypatch.setattr(enlarging, "TILE_PX", 512)
    seen: list[int] = []

    def fail(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(max(inputs[0].shape))
        if seen[-1] > 140:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = network.network.register_forward_pre_hook(fail)
    before = second_tries.COUNTS["enlarged in smaller tiles"]
    assert largest_difference(enlarger(network, CPU)(PICTURE, (600, 420)), expected) <= 1
    assert second_tries.COUNTS["enlarged in smaller tiles"] == before + 2
    hook.remove()

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    network.network.register_forward_pre_hook(never)
    with pytest.raises(torch.OutOfMemoryError):
        enlarger(network, CPU)(PICTURE, (600, 420))


def test_it_can_be_stopped_between_two_tiles(
    network: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enlarging, "TILE_PX", 128)
    seen = sizes_seen(network)

    class StoppedError(Exception):
        pass

    def check() -> None:
        if len(seen) == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        enlarger(network, CPU, check)(PICTURE, (600, 420))
    assert len(seen) == 3


def test_the_tiles_are_told(network: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enlarging, "TILE_PX", 192)
    told: list[tuple[int, int]] = []
    enlarge = enlarger(network, CPU, on_tile=lambda *tile: told.append(tile))
    enlarge(PICTURE, (600, 420))
    assert told == [(i + 1, 6) for i in range(6)]
