"""The world of the miniature model: five shapes in eight colours, drawn from signed distances.

Coordinates are pixels with the origin in the top left corner and pixel centres at halves. A shape
is described at unit size, around (0, 0), with y downwards.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 35, 40),
    "yellow": (250, 215, 40),
    "green": (30, 150, 60),
    "cyan": (60, 215, 235),
    "blue": (35, 70, 215),
    "magenta": (215, 55, 200),
    "black": (20, 20, 24),
    "white": (245, 245, 245),
}
"""None lies between others: strong guidance pushes a colour away from all the rest, and one in
between (orange, between red and yellow) then swings to and fro under multistep schedulers."""
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring")

SQUARE_HALF_SIDE = 0.85
RING_HOLE = 0.55
STAR_NOTCH = 0.45

RADIUS_RANGE = (0.25, 0.36)
"""Of the shorter side."""
CENTER_JITTER = 0.10
"""Of each side; with the largest radius every shape stays inside the picture."""


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background; lengths are shares of the picture's sides."""

    shape: str
    color: str
    background: str
    center_x: float = 0.5
    center_y: float = 0.5
    radius: float = 0.3


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with two different colours; placed and sized at random."""
    color, background = rng.choice(len(COLORS), size=2, replace=False)
    center_x, center_y = 0.5 + rng.uniform(-CENTER_JITTER, CENTER_JITTER, size=2)
    return Scene(
        shape=SHAPES[rng.integers(len(SHAPES))],
        color=COLORS[color],
        background=COLORS[background],
        center_x=float(center_x),
        center_y=float(center_y),
        radius=float(rng.uniform(*RADIUS_RANGE)),
    )


@functools.cache
def _triangle_vertices() -> FloatArray:
    """(3, 2), equilateral, moved down so that its bounding box is centred."""
    angles = np.deg2rad([-90.0, 30.0, 150.0])
    vertices = np.stack([np.cos(angles), np.sin(angles) + 0.25], axis=1)
    return vertices.astype(np.float32)


@functools.cache
def _star_vertices() -> FloatArray:
    """(10, 2), tips and notches in turn, the first tip upwards."""
    angles = np.deg2rad(-90.0 + 36.0 * np.arange(10))
    radii = np.where(np.arange(10) % 2 == 0, 1.0, STAR_NOTCH)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1).astype(np.float32)


def _polygon_distance(x: FloatArray, y: FloatArray, vertices: FloatArray) -> FloatArray:
    """Exact signed distance to a polygon (Inigo Quilez, "2D distance functions", sdPolygon)."""
    squared = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, 1, axis=0), strict=True):
        edge_x, edge_y = bx - ax, by - ay
        to_x, to_y = x - ax, y - ay
        along = (to_x * edge_x + to_y * edge_y) / (edge_x**2 + edge_y**2)
        along = np.clip(along, 0.0, 1.0)
        squared = np.minimum(squared, (to_x - edge_x * along) ** 2 + (to_y - edge_y * along) ** 2)
        crosses = (y >= ay) != (y >= by)
        left = (edge_x * to_y > edge_y * to_x) == (edge_y > 0)
        inside ^= crosses & left
    return np.where(inside, -1.0, 1.0).astype(np.float32) * np.sqrt(squared)


def signed_distance(shape: str, x: FloatArray, y: FloatArray) -> FloatArray:
    """Distance to the outline of the unit-sized `shape`, negative inside; x and y of equal size."""
    if shape == "circle":
        return (np.hypot(x, y) - 1.0).astype(np.float32)
    if shape == "ring":
        half = (1.0 - RING_HOLE) / 2
        return (np.abs(np.hypot(x, y) - (1.0 - half)) - half).astype(np.float32)
    if shape == "square":
        out_x, out_y = np.abs(x) - SQUARE_HALF_SIDE, np.abs(y) - SQUARE_HALF_SIDE
        outside = np.hypot(np.maximum(out_x, 0.0), np.maximum(out_y, 0.0))
        return outside + np.minimum(np.maximum(out_x, out_y), 0.0)
    if shape == "triangle":
        return _polygon_distance(x, y, _triangle_vertices())
    if shape == "star":
        return _polygon_distance(x, y, _star_vertices())
    raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")


def coverage(
    shape: str, height: int, width: int, center_x: float, center_y: float, radius: float
) -> FloatArray:
    """Share of each pixel that the shape covers, (height, width); centre and radius in pixels."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    distance = signed_distance(shape, (columns - center_x) / radius, (rows - center_y) / radius)
    return np.clip(0.5 - distance * radius, 0.0, 1.0).astype(np.float32)


def render(scene: Scene, height: int, width: int) -> NDArray[np.uint8]:
    """The anti-aliased picture of a scene, (height, width, 3)."""
    share = coverage(
        scene.shape,
        height,
        width,
        scene.center_x * width,
        scene.center_y * height,
        scene.radius * min(height, width),
    )[..., None]
    color = np.array(PALETTE[scene.color], dtype=np.float32)
    background = np.array(PALETTE[scene.background], dtype=np.float32)
    return np.round(share * color + (1.0 - share) * background).astype(np.uint8)
