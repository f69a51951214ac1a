"""Maps of a scene, as a ControlNet is shown them: its outline, its depth, its regions, its blur.

All are made from the distance to the shape's outline, and none is perfect: lines wobble, thicken
and break, as those that an edge detector finds or a hand draws. OpenCV is not needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shapes.data import Scene, signed_distance

DEPTH, SOFT_EDGE, CANNY, SEGMENT, TILE = 1, 2, 3, 5, 6
"""Numbers that the published union model gives to the kinds of map; 0 is a pose, 4 normals, and 7
a picture with a hole, none of which this world has."""

STEPS_PER_PIXEL = 16
"""Of the distances that are kept: in bytes, up to eight pixels from the outline."""
TILE_PX = 8


def distances(scene: Scene, height: int, width: int) -> NDArray[np.int8]:
    """To the outline, negative inside, in sixteenths of a pixel, (height, width)."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    radius = scene.radius * min(height, width)
    x = (columns - scene.center_x * width) / radius
    y = (rows - scene.center_y * height) / radius
    steps = signed_distance(scene.shape, x, y) * radius * STEPS_PER_PIXEL
    return np.round(steps).clip(-127, 127).astype(np.int8)


def draw(mode: int, steps: Tensor, pictures: Tensor) -> Tensor:
    """Maps (n, 3, height, width) in 0..1, drawn at random from torch's generator.

    `steps` are the distances (n, height, width), `pictures` the scenes' own (n, 3, height, width)
    in 0..1.
    """
    if mode == TILE:
        return _tile(pictures)
    distance = steps.float() / STEPS_PER_PIXEL
    kinds: dict[int, Callable[[Tensor], Tensor]] = {
        DEPTH: _depth,
        SOFT_EDGE: _soft_edge,
        CANNY: _canny,
        SEGMENT: _segment,
    }
    return kinds[mode](distance)


def _uniform(count: int, low: float, high: float) -> Tensor:
    """(n, 1, 1)."""
    return low + (high - low) * torch.rand(count, 1, 1)


def _some(count: int, share: float) -> Tensor:
    """(n, 1, 1): which of the samples."""
    return torch.rand(count, 1, 1) < share


def _smooth_noise(like: Tensor, cells: int) -> Tensor:
    """Of unit strength and (n, height, width), with so many bumps along each side."""
    coarse = torch.randn(len(like), 1, cells, cells)
    return functional.interpolate(coarse, size=like.shape[-2:], mode="bicubic").squeeze(1)


def _wobbled(distance: Tensor, strength: float) -> Tensor:
    """The outline moved to and fro by up to about so many pixels."""
    moved = _smooth_noise(distance, 6) * _uniform(len(distance), 0.0, strength)
    return distance + moved + _uniform(len(distance), -strength, strength)


def _canny(distance: Tensor) -> Tensor:
    """A white line of one pixel on black; some are thicker, soft, broken, or among specks."""
    count = len(distance)
    half = torch.where(_some(count, 0.25), _uniform(count, 0.4, 1.5), torch.tensor(0.5))
    line = (_wobbled(distance, 0.5).abs() <= half).float()
    gone = (_smooth_noise(distance, 8) > _uniform(count, 0.7, 2.0)) & _some(count, 0.4)
    line = line * ~gone
    speck = (torch.rand_like(distance) < 0.002) & _some(count, 0.1)
    line = torch.maximum(line, speck.float())
    soft = (2.0 * functional.avg_pool2d(line[:, None], 3, stride=1, padding=1)).clamp(max=1.0)
    return _grey(torch.where(_some(count, 0.15), soft.squeeze(1), line))


def _soft_edge(distance: Tensor) -> Tensor:
    """A broad line that fades to both sides."""
    width = _uniform(len(distance), 1.0, 3.0)
    return _grey(torch.exp(-((_wobbled(distance, 1.0) / width) ** 2)))


def _depth(distance: Tensor) -> Tensor:
    """The shape near (white), its background far (black)."""
    near, far = _uniform(len(distance), 0.7, 1.0), _uniform(len(distance), 0.0, 0.3)
    return _grey(far + (near - far) * _inside(distance))


def _segment(distance: Tensor) -> Tensor:
    """Two flat regions, in any two colours: which ones says nothing of the picture's."""
    count = len(distance)
    one = torch.rand(count, 3, 1, 1)
    other = (one + 0.3 + 0.4 * torch.rand(count, 3, 1, 1)) % 1.0
    return torch.lerp(one, other, _inside(distance)[:, None])


def _tile(pictures: Tensor) -> Tensor:
    """The picture without its detail."""
    small = functional.avg_pool2d(pictures, TILE_PX)
    return functional.interpolate(small, size=pictures.shape[-2:], mode="bilinear")


def _inside(distance: Tensor) -> Tensor:
    """Share of each pixel that the shape covers."""
    return (0.5 - _wobbled(distance, 0.5)).clamp(0.0, 1.0)


def _grey(values: Tensor) -> Tensor:
    return values[:, None].expand(-1, 3, -1, -1)
