"""Depth maps: what is near is white, in the picture's own size."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_worker.drawing.depth_maps import depth_map
from sdxl_worker.loading.preprocessors import DepthFiles
from sdxl_worker.placement import Placement
from tests.loading.transformers_networks import save_depth_network
from tests.support import noise_picture

CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


class Brightness(torch.nn.Module):
    """Takes what is bright for near, and notes what it gets."""

    def __init__(self, nearest: float = 3.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.nearest = nearest
        self.seen = torch.zeros(0)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        self.seen = pixel_values
        return SimpleNamespace(predicted_depth=7 + self.nearest * pixel_values.mean(dim=1))


def half_and_half(size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
    return picture


def test_the_nearest_is_white_and_the_furthest_black_whatever_the_network_s_scale() -> None:
    for nearest in (0.01, 50.0):
        levels = np.asarray(depth_map(half_and_half((96, 64)), Brightness(nearest), CPU))
        assert levels.shape == (64, 96, 3)
        assert levels[:, :40].min() > 250
        assert levels[:, 56:].max() < 5
        assert (levels.min(), levels.max()) == (0, 255)


@pytest.mark.parametrize(
    ("size", "seen"), [((96, 64), (518, 784)), ((1024, 1024), (518, 518)), ((64, 4096), (2072, 28))]
)
def test_the_network_sees_the_picture_as_it_was_trained(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    """Its shorter side of 518 pixels, both of whole patches of 14, ImageNet's mean as 0."""
    network = Brightness()
    depth_map(Image.new("RGB", size, (124, 116, 104)), network, CPU)
    assert network.seen.shape == (1, 3, *seen)
    assert network.seen.abs().max() < 0.02


def test_a_flat_picture_has_no_depth_and_is_no_failure() -> None:
    levels = np.asarray(depth_map(Image.new("RGB", (64, 64), "red"), Brightness(), CPU))
    assert not levels.any()


def test_depth_anything_makes_one(tmp_path: Path) -> None:
    save_depth_network(tmp_path)
    network = DepthFiles(tmp_path).load(CPU)
    picture = noise_picture(72, 64)
    found = depth_map(picture, network, CPU)
    assert (found.size, found.mode) == (picture.size, "RGB")
    assert len(found.getcolors(72 * 64) or ()) > 50
    assert depth_map(picture, network, CPU).tobytes() == found.tobytes()
