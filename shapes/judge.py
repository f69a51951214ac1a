"""Says what a picture shows, so that a test can check its meaning: `judge(image).matches(prompt)`.

Needs NumPy and Pillow only. Nothing here is learned: colours are compared with the palette,
outlines with the drawn shapes.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shapes.captions import Meaning
from shapes.data import COLORS, PALETTE, SHAPES, signed_distance

CLEAR_IOU = 0.8
"""Least overlap with a drawn shape for an outline to count as that shape."""
CLEAR_FLAT_DISTANCE = 60.0
"""Largest mean distance to the pure colours (0..255 scale); beyond it nothing counts as seen."""
BORDER_SHARE = 0.04
"""Of the shorter side: the depth of the border that is read for the background."""
EDGE_SHARE = 0.03
"""Of the shorter side: pixels as near as this to an outline do not count as flat."""
STRAY_DISTANCE = 60.0
"""A pixel further than this from every blend of both colours (0..255 scale) is a stray."""
LARGEST_SIDE_PX = 160
"""Outlines of larger pictures are compared at every second, third, ... pixel."""

TEMPLATE_EXTENT = 1.25
TEMPLATE_SIDE = 500
SEARCH_STEPS = (0.08, 0.04, 0.02, 0.01)
"""Shares of the radius, by which centre and radius are moved in turn."""

_COLOR_ROWS = np.array([PALETTE[name] for name in COLORS], dtype=np.float32)

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Judgement:
    """What a picture shows; shape and colour are None where nothing stands out."""

    shape: str | None
    color: str | None
    background: str
    iou: float
    """Overlap of the outline with the best drawn shape, 0..1: how clean the edges are."""
    margin: float
    """By how much the best shape's overlap exceeds the second best's."""
    flat_distance: float
    """Mean distance (RGB, 0..255 scale) to the two pure colours, away from the outline."""
    center: tuple[float, float]
    """x and y of the best drawn shape, as shares of width and height."""
    radius: float
    """Of the best drawn shape, as a share of the shorter side."""

    def matches(self, prompt: str, *, least_iou: float = CLEAR_IOU) -> bool:
        """Whether everything that the prompt names is seen; what it leaves open is not checked."""
        expected = parse_caption(prompt)
        if self.flat_distance > CLEAR_FLAT_DISTANCE:
            return False
        if expected.shape and (self.shape != expected.shape or self.iou < least_iou):
            return False
        return (
            expected.color in (None, self.color)
            and expected.background in (None, self.background)
            and expected.either in (None, self.color, self.background)
        )


def parse_caption(prompt: str) -> Meaning:
    """The shape and the colours that a prompt names; of several for one thing, the last counts.

    A colour belongs to the background if it stands before "background" or "wall", or after "on",
    "over", "against" or "background" with no thing following ("the background is white").
    """
    words = re.findall("[a-z]+", prompt.lower())
    things = {*SHAPES, "shape", "thing"}
    shape = color = background = None
    loose = []
    for i, word in enumerate(words):
        if word in SHAPES:
            shape = word
        if word not in COLORS:
            continue
        following = words[i + 1] if i + 1 < len(words) else ""
        before = [other for other in words[:i] if other not in ("a", "an", "the", "is", "in")]
        after_ground = bool(before) and before[-1] in ("on", "over", "against", "background")
        if following in ("background", "wall"):
            background = word
        elif following in things:
            color = word
        elif after_ground:
            background = word
        else:
            loose.append(word)
    if loose and (shape or things & set(words) or "something" in words):
        color = color or loose[-1]
    elif loose:
        return Meaning(background=background, either=loose[-1])
    return Meaning(shape, color, background)


def judge(image: Image.Image) -> Judgement:
    """Judge a picture of one shape on a plain background, of about 64 to 256 px a side."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    height, width = pixels.shape[:2]
    shorter = min(height, width)

    distances = np.stack([np.linalg.norm(pixels - row, axis=-1) for row in _COLOR_ROWS], axis=-1)
    nearest = distances.argmin(axis=-1)
    border: Mask = np.ones((height, width), dtype=bool)
    depth = max(2, round(BORDER_SHARE * shorter))
    border[depth:-depth, depth:-depth] = False
    background = _most_frequent(nearest[border])

    rough: Mask = np.asarray(nearest != background)
    inner = _eroded(rough, max(1, shorter // 64))
    if not inner.any():
        flat = float(distances[..., background].mean())
        return Judgement(None, None, COLORS[background], 0.0, 0.0, flat, (0.5, 0.5), 0.0)
    color = _most_frequent(nearest[inner])

    mask = _foreground(pixels, _COLOR_ROWS[color], _COLOR_ROWS[background])
    edge = max(2, round(EDGE_SHARE * shorter))
    far_inside, far_outside = _eroded(mask, edge), _eroded(~mask, edge)
    flat_pixels = np.concatenate(
        [distances[..., color][far_inside], distances[..., background][far_outside]]
    )
    flat = float(flat_pixels.mean()) if flat_pixels.size else math.inf

    fits = sorted(((*_fit(mask, shape), shape) for shape in SHAPES), reverse=True)
    iou, x, y, radius, shape = fits[0]
    return Judgement(
        shape=shape,
        color=COLORS[color],
        background=COLORS[background],
        iou=iou,
        margin=iou - fits[1][0],
        flat_distance=flat,
        center=(x / width, y / height),
        radius=radius / shorter,
    )


def _most_frequent(labels: NDArray[np.intp]) -> int:
    return int(np.bincount(labels.ravel(), minlength=len(COLORS)).argmax())


def _foreground(pixels: Pixels, color: Pixels, background: Pixels) -> Mask:
    """Pixels nearer to `color` than to `background`, and strays that are a blend of neither."""
    axis = color - background
    share = np.clip((pixels - background) @ axis / (axis @ axis), 0.0, 1.0)
    residual = np.linalg.norm(pixels - background - share[..., None] * axis, axis=-1)
    return np.asarray((share > 0.5) | (residual > STRAY_DISTANCE), dtype=np.bool_)


def _eroded(mask: Mask, pixels: int) -> Mask:
    """The mask without what is within so many pixels of its outline; picture borders are kept."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (pixels, pixels)
        padded = np.pad(mask, padding, constant_values=True)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * pixels + 1, axis=axis)
        mask = np.asarray(windows.all(axis=-1), dtype=np.bool_)
    return mask


@functools.cache
def _template(shape: str) -> Mask:
    """The unit-sized shape on a fine grid over -1.25..1.25, (500, 500)."""
    places = (np.arange(TEMPLATE_SIDE) + 0.5) / TEMPLATE_SIDE
    line = ((2.0 * places - 1.0) * TEMPLATE_EXTENT).astype(np.float32)
    x, y = np.tile(line, (TEMPLATE_SIDE, 1)), np.repeat(line[:, None], TEMPLATE_SIDE, axis=1)
    template: Mask = signed_distance(shape, x, y) < 0.0
    template[[0, -1]] = False
    template[:, [0, -1]] = False
    return template


@functools.cache
def _template_moments(shape: str) -> tuple[float, float]:
    """Area of the unit-sized shape and the height of its centre of mass (y downwards)."""
    template = _template(shape)
    spacing = 2.0 * TEMPLATE_EXTENT / TEMPLATE_SIDE
    row = float(np.nonzero(template)[0].mean())
    return float(template.sum()) * spacing**2, (row + 0.5) * spacing - TEMPLATE_EXTENT


def _fit(mask: Mask, shape: str) -> tuple[float, float, float, float]:
    """The best overlap of the mask with a drawn shape: IoU, centre x and y, radius in pixels.

    Begins with the mask's area and centre of mass, and moves by ever smaller shares.
    """
    stride = math.ceil(max(mask.shape) / LARGEST_SIDE_PX)
    rows, columns = (np.arange(0, side, stride, dtype=np.float32) + 0.5 for side in mask.shape)
    small = mask[::stride, ::stride]
    if not small.any():
        return 0.0, 0.0, 0.0, 0.0
    area, center_of_mass = _template_moments(shape)
    template, total = _template(shape), int(small.sum())

    def overlap(x: float, y: float, radius: float) -> float:
        scale = TEMPLATE_SIDE / (2.0 * TEMPLATE_EXTENT * radius)
        row_index = ((rows - y) * scale + TEMPLATE_SIDE / 2).astype(np.intp)
        column_index = ((columns - x) * scale + TEMPLATE_SIDE / 2).astype(np.intp)
        drawn = template[
            row_index.clip(0, TEMPLATE_SIDE - 1)[:, None],
            column_index.clip(0, TEMPLATE_SIDE - 1)[None],
        ]
        both = int(np.count_nonzero(drawn & small))
        # The part of the shape outside the picture counts as missed; otherwise a mask that fills
        # the picture would be a circle.
        whole = max(float(np.count_nonzero(drawn)), area * (radius / stride) ** 2)
        return both / (total + whole - both)

    mass_row, mass_column = (float(axis.mean()) for axis in np.nonzero(small))
    radius = math.sqrt(total / area) * stride
    best = (
        mass_column * stride + 0.5,
        mass_row * stride + 0.5 - center_of_mass * radius,
        radius,
    )
    best_overlap = overlap(*best)
    for step in SEARCH_STEPS:
        improved = True
        while improved:
            improved = False
            x, y, radius = best
            for axis, sign in itertools.product(range(3), (-1.0, 1.0)):
                moved = [x, y, radius]
                moved[axis] += sign * step * radius
                value = overlap(*moved)
                if value > best_overlap:
                    best, best_overlap, improved = (moved[0], moved[1], moved[2]), value, True
    return best_overlap, *best
