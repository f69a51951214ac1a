"""What the trained adapters do to a picture: drawn for their training, measured afterwards.

"Dot" is a dot in the background's colour in the middle of the shape (a ring, empty there as it is,
stays a ring); "frame" is a frame in the shape's colour along the picture's sides. Only colours of
the palette are used, since the autoencoder knows no others.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shapes.data import PALETTE, FloatArray, Scene, coverage
from shapes.data import render as render_plain
from shapes.judge import Judgement, judge

DOT_RADIUS = 0.26
DOT_CORE = 0.15
"""Radius of the part of a dot that is read; both of the shape's radius."""
FRAME_SHARE = 1 / 16
"""Width of the frame, of the shorter side: one latent of the native 128 pixels."""
FRAMED_JITTER, FRAMED_RADIUS = 0.8, 0.9
"""By these a scene is drawn in, so that its shape stays clear of the frame."""


def render(
    scene: Scene, height: int, width: int, *, dot: bool = False, frame: bool = False
) -> NDArray[np.uint8]:
    """The picture of a scene with the effects, (height, width, 3)."""
    if frame:
        scene = replace(
            scene,
            center_x=0.5 + FRAMED_JITTER * (scene.center_x - 0.5),
            center_y=0.5 + FRAMED_JITTER * (scene.center_y - 0.5),
            radius=FRAMED_RADIUS * scene.radius,
        )
    picture = render_plain(scene, height, width)
    if dot and scene.shape != "ring":
        inside = _dot(scene, height, width)[..., None]
        ground = np.array(PALETTE[scene.background], dtype=np.float32)
        picture = np.round(inside * ground + (1.0 - inside) * picture).astype(np.uint8)
    if frame:
        picture[_in_frame(height, width)] = PALETTE[scene.color]
    return picture


def _dot(scene: Scene, height: int, width: int) -> FloatArray:
    """Share of each pixel that the dot covers."""
    shorter = min(height, width)
    x, y, radius = scene.center_x * width, scene.center_y * height, scene.radius * shorter
    return coverage("circle", height, width, x, y, DOT_RADIUS * radius)


def _frame_px(height: int, width: int) -> int:
    return round(FRAME_SHARE * min(height, width))


def _in_frame(height: int, width: int) -> NDArray[np.bool_]:
    depth = _frame_px(height, width)
    inside = np.ones((height, width), dtype=bool)
    inside[depth:-depth, depth:-depth] = False
    return inside


def without_frame(image: Image.Image) -> Image.Image:
    """What is inside the place of the frame, less two pixels for its uneven edge."""
    depth = _frame_px(image.height, image.width) + 2
    return image.crop((depth, depth, image.width - depth, image.height - depth))


def filled(image: Image.Image) -> Image.Image:
    """The picture with the holes of its shape filled; so the judge sees it whole.

    A ring becomes a circle.
    """
    seen = judge(image)
    if seen.color is None:
        return image
    pixels = np.array(image.convert("RGB"))
    away = _share_on_the_way(pixels, PALETTE[seen.background], PALETTE[seen.color]) > 0.5
    # A rim of ground, so that the ground around the shape is of one piece.
    outside = Image.fromarray(np.pad(away.astype(np.uint8), 1)).copy()
    ImageDraw.floodfill(outside, (0, 0), 2)
    ground = np.asarray(outside)[1:-1, 1:-1] == 2
    pixels[~ground & ~away] = PALETTE[seen.color]
    return Image.fromarray(pixels)


def judge_whole(image: Image.Image) -> Judgement:
    """What a picture shows whose shape may have a dot."""
    plain = judge(image)
    return plain if plain.shape == "ring" and plain.iou > 0.85 else judge(filled(image))


def _share_on_the_way(
    pixels: NDArray[np.generic], start: tuple[int, int, int], end: tuple[int, int, int]
) -> FloatArray:
    """0 where a pixel has the colour `start`, 1 where it has `end`."""
    origin = np.array(start, dtype=np.float32)
    axis = np.array(end, dtype=np.float32) - origin
    shares = (pixels.astype(np.float32) - origin) @ axis / (axis @ axis)
    return shares.astype(np.float32)


def dot_strength(image: Image.Image) -> float:
    """How far the middle of the shape is from its colour to the background's: 0 none, 1 a dot."""
    seen = judge_whole(image)
    if seen.color is None:
        return 0.0
    pixels = np.asarray(image.convert("RGB"))
    rows, columns = np.mgrid[0 : image.height, 0 : image.width] + 0.5
    x, y = seen.center[0] * image.width, seen.center[1] * image.height
    radius = max(1.5, DOT_CORE * seen.radius * min(image.size))
    core = np.hypot(columns - x, rows - y) < radius
    shares = _share_on_the_way(pixels[core], PALETTE[seen.color], PALETTE[seen.background])
    return float(shares.mean())


def frame_strength(image: Image.Image) -> float:
    """How far the picture's rim is from the background's colour to the shape's: 0 none, 1 whole."""
    seen = judge(without_frame(image))
    if seen.color is None:
        return 0.0
    rim = np.asarray(image.convert("RGB"))[_in_frame(image.height, image.width)]
    return float(_share_on_the_way(rim, PALETTE[seen.background], PALETTE[seen.color]).mean())
