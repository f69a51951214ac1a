"""Masks in other sizes. A mask is an array of booleans, [height, width]: what is true is repainted,
and nothing of it is lost on the way.
"""

import numpy as np
from numpy.typing import NDArray

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
