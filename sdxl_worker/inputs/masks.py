"""Masks in other sizes. A mask is an array of booleans, [height, width]: what is true is repainted,
and nothing of it is lost on the way.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.bool_]

# Floats that should be whole numbers are off by less.
_ROUNDING = 1e-9


def covering(
    mask: Mask, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Mask:
    """The mask in another size (width, height), true wherever a part of a pixel was.

    Args:
        box: the part of the mask that becomes the whole: left, top, right, bottom.
    """
    height, width = mask.shape
    left, top, right, bottom = box or (0, 0, width, height)
    return _any_of(_any_of(mask, top, bottom, size[1]).T, left, right, size[0]).T


def _any_of(mask: Mask, begin: float, end: float, count: int) -> Mask:
    """`count` rows, each true where one of the rows is that lie in its share of begin to end."""
    borders = begin + np.arange(count + 1) * ((end - begin) / count)
    first = np.floor(borders[:-1] + _ROUNDING).astype(int)
    last = np.ceil(borders[1:] - _ROUNDING).astype(int) - 1
    rows = np.zeros((count, mask.shape[1]), bool)
    for offset in range(int((last - first).max()) + 1):
        rows |= mask[np.minimum(first + offset, last)]
    return rows


def filled(pixels: NDArray[np.uint8], mask: Mask) -> NDArray[np.uint8]:
    """A picture [height, width, 3] whose masked pixels have the colours of those around them: of
    the nearest, wherever these are, and the further away the more of them.
    """
    known = ~mask
    if known.all() or not known.any():
        return pixels
    height, width = mask.shape
    half = (width + 1) // 2, (height + 1) // 2
    even = 2 * half[0], 2 * half[1]
    weights = with_edges(known, even).reshape(half[1], 2, half[0], 2, 1).astype(np.uint16)
    colours = with_edges(pixels, even).reshape(half[1], 2, half[0], 2, 3)
    count = weights.sum((1, 3))
    mean = (colours * weights).sum((1, 3)) // np.maximum(count, 1)
    smaller = filled(mean.astype(np.uint8), count[..., 0] == 0)
    larger = Image.fromarray(smaller).resize(even, Image.Resampling.BILINEAR)
    return np.where(mask[..., None], np.asarray(larger)[:height, :width], pixels)


def with_edges(array: NDArray, size: tuple[int, int], offset: tuple[int, int] = (0, 0)) -> NDArray:
    """A picture or a mask at a place in a larger size, filled up with its edge pixels. Size and
    place are of width and height.
    """
    (left, top), (height, width) = offset, array.shape[:2]
    across = (left, size[0] - width - left)
    down = (top, size[1] - height - top)
    if not any(across + down):
        return array
    return np.pad(array, (down, across, (0, 0))[: array.ndim], mode="edge")
