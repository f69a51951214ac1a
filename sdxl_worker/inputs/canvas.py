"""What the models are given of an input picture, and how what they draw is put back into it."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sdxl_worker.field_types import MIN_SIDE_PX, SIDE_MULTIPLE_PX
from sdxl_worker.inputs.fitting import MAX_AUTOMATIC_SIDE_PX
from sdxl_worker.inputs.masks import Mask, covering, filled, with_edges

# Left, top, right, bottom.
Box = tuple[int, int, int, int]
Enlarge = Callable[[Image.Image, tuple[int, int]], Image.Image]
"""An RGB picture, and the width and height that it gets."""

# Of the part that is painted alone, where the picture has room: longer ones are drawn badly.
_MAX_ASPECT_RATIO = 2


@dataclass(frozen=True)
class _Patch:
    """The part of the picture that is painted."""

    box: Box
    mask: Mask
    """[height, width] of the box: true is repainted."""
    blur_px: int
    is_scaled: bool
    """Whether it is painted in another size; if not, edges were added to the right and below."""

    @property
    def size(self) -> tuple[int, int]:
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @functools.cached_property
    def opacity(self) -> NDArray[np.uint8]:
        """[height, width] of the box: 0 keeps the picture's pixel, 255 takes the drawn one."""
        return _blurred(self.mask, self.blur_px)


@dataclass(frozen=True)
class Canvas:
    """An input picture, what of it is drawn on, and which of its pixels may change."""

    picture: Image.Image
    """RGB, in the size that comes out."""
    working: Image.Image
    """RGB, what the models get."""
    mask: Mask | None
    """[height, width] of `working`: true is repainted. None: all of it."""
    _patch: _Patch | None = None
    larger: "Canvas | None" = None
    """The same for the second pass of `hires`, whose picture comes out then."""

    def put_back(self, drawn: Image.Image) -> Image.Image:
        """The picture with what was drawn in the place of the last `working`, whose size it has.

        What the mask and its blur do not reach is equal to the picture, byte for byte.
        """
        if self.larger is not None:
            return self.larger.put_back(drawn)
        if self._patch is None:
            return drawn
        if self._patch.is_scaled:
            drawn = drawn.resize(self._patch.size, Image.Resampling.LANCZOS)
        else:
            drawn = drawn.crop((0, 0, *self._patch.size))
        result = self.picture.copy()
        old = self.picture.crop(self._patch.box)
        result.paste(_blended(old, drawn, self._patch.opacity), self._patch.box[:2])
        return result

    def as_working(self, picture: Image.Image) -> Image.Image:
        """Of another picture of the size of `picture`, the part that `working` is of that."""
        if self._patch is None:
            return picture
        part = picture.crop(self._patch.box)
        if self._patch.is_scaled:
            return part.resize(self.working.size, Image.Resampling.LANCZOS)
        return Image.fromarray(with_edges(np.asarray(part), self.working.size))

    def mask_as_working(self, mask: Mask) -> Mask:
        """As `as_working`, of a mask."""
        if self._patch is None:
            return mask
        left, top, right, bottom = self._patch.box
        part = mask[top:bottom, left:right]
        of_size = covering if self._patch.is_scaled else with_edges
        return of_size(part, self.working.size)

    def larger_sizes(self, scale: float) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of `picture` and `working`, width and height for a second pass that is so much larger."""
        working = larger_size(self.working.size, scale)
        if self._patch is None:
            return working, working
        picture = _times(self.picture.size, scale)
        return picture, working if self._patch.is_scaled else _whole_size(picture)

    def with_larger(self, scale: float, enlarge: Enlarge) -> "Canvas":
        """With `larger`: everything so much larger, and the picture as `enlarge` makes it."""
        picture_size, working_size = self.larger_sizes(scale)
        patch = self._patch
        if patch is None:
            # All of it is redrawn: nothing will be seen of this one.
            blank = Image.new("RGB", working_size)
            return replace(self, larger=Canvas(blank, blank, None))
        left, top, right, bottom = (round(side * scale) for side in patch.box)
        size = (right - left, bottom - top)
        # In a larger size, the nearest pixel loses nothing of a mask.
        mask = np.asarray(Image.fromarray(patch.mask).resize(size, Image.Resampling.NEAREST))
        blur_px = math.floor(patch.blur_px * scale)
        grown = _Patch((left, top, right, bottom), mask, blur_px, patch.is_scaled)
        larger = _canvas(enlarge(self.picture, picture_size), grown, working_size)
        return replace(self, larger=larger)

    def enlarged(self, drawn: Image.Image, enlarge: Enlarge) -> Image.Image:
        """What was drawn in the place of `working`, in the size of the second pass: as
        `larger.working` is made of the larger picture."""
        larger = self.larger
        if larger is None:
            raise ValueError("this canvas has no larger one")
        if self._patch is None or larger._patch is None or self._patch.is_scaled:
            return enlarge(drawn, larger.working.size)
        within = enlarge(drawn.crop((0, 0, *self._patch.size)), larger._patch.size)
        return Image.fromarray(with_edges(np.asarray(within), larger.working.size))


def prepare_canvas(
    picture: Image.Image,
    mask: Mask | None,
    *,
    mask_blur: int,
    mask_padding: int | None,
    native_size_px: int,
    max_side_px: int,
) -> Canvas:
    """What the models are to draw on.

    Without `mask_padding` it is the whole picture. With it, it is the box around the mask and so
    many pixels more, or as many as the blur reaches, in the size that the model draws best.

    Args:
        picture: RGB. Without a mask, its sides suit the models.
        mask: [height, width] of the picture, not empty: true is repainted.
        mask_blur: by how many pixels old and new are blended, on either side of the mask's edge.
        native_size_px: the model draws squares of such sides best.
        max_side_px: a whole picture that is larger is painted smaller, and scaled back.
    """
    if mask is None:
        return Canvas(picture, picture, None)
    if mask_padding is None:
        box = (0, 0, *picture.size)
        is_scaled = max(picture.size) > max_side_px
        size = _smaller_size(picture.size, max_side_px) if is_scaled else _whole_size(picture.size)
    else:
        box = _box_around(mask, max(mask_padding, mask_blur))
        size = _native_size(box[2] - box[0], box[3] - box[1], native_size_px)
        is_scaled = True
    part_mask = mask[box[1] : box[3], box[0] : box[2]]
    return _canvas(picture, _Patch(box, part_mask, mask_blur, is_scaled), size)


def _canvas(picture: Image.Image, patch: _Patch, size: tuple[int, int]) -> Canvas:
    """
    Args:
        size: of what the models get.
    """
    part = picture.crop(patch.box)
    if patch.is_scaled:
        working = part.resize(size, Image.Resampling.LANCZOS)
        mask = covering(patch.mask, size)
    else:
        working = Image.fromarray(with_edges(np.asarray(part), size))
        mask = with_edges(patch.mask, size)
    return Canvas(picture, working, mask, patch)


def larger_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """So many times the width and the height, as the models take them. Halves go up, all of them:
    half of them would go down by Python's rounding, and change the shape."""
    width, height = (
        math.floor(side * scale / SIDE_MULTIPLE_PX + 0.5) * SIDE_MULTIPLE_PX for side in size
    )
    return width, height


def with_holes_filled(picture: Image.Image, mask: Mask) -> Image.Image:
    """The picture with the colours around it in what is masked."""
    return Image.fromarray(filled(np.asarray(picture), mask))


def _times(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(size[0] * scale), round(size[1] * scale)


def _smaller_size(size: tuple[int, int], max_side_px: int) -> tuple[int, int]:
    scale = max_side_px / max(size)
    return _as_side(size[0] * scale), _as_side(size[1] * scale)


def _whole_size(size: tuple[int, int]) -> tuple[int, int]:
    """With edges."""
    width, height = (
        max(MIN_SIDE_PX, math.ceil(side / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX) for side in size
    )
    return width, height


def _native_size(width: int, height: int, native_size_px: int) -> tuple[int, int]:
    """As many pixels as the model draws best, in the same shape."""
    scale = min(
        native_size_px / math.sqrt(width * height), MAX_AUTOMATIC_SIDE_PX / max(width, height)
    )
    return _as_side(width * scale), _as_side(height * scale)


def _as_side(side: float) -> int:
    return max(MIN_SIDE_PX, round(side / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX)


def _box_around(mask: Mask, padding: int) -> Box:
    height, width = mask.shape
    left, right = _span(np.any(mask, axis=0), padding)
    top, bottom = _span(np.any(mask, axis=1), padding)
    shortest = math.ceil(max(right - left, bottom - top) / _MAX_ASPECT_RATIO)
    left, right = _grown(left, right, shortest, width)
    top, bottom = _grown(top, bottom, shortest, height)
    return left, top, right, bottom


def _span(used: NDArray[Any], padding: int) -> tuple[int, int]:
    """From the first to the last that is used, and the padding on either side."""
    places = np.flatnonzero(used)
    return max(0, int(places[0]) - padding), min(len(used), int(places[-1]) + 1 + padding)


def _grown(begin: int, end: int, least: int, limit: int) -> tuple[int, int]:
    """To the least length on both sides alike, or on one where the other is at its limit."""
    length = min(max(end - begin, least), limit)
    begin = min(max(0, begin - (length - (end - begin)) // 2), limit - length)
    return begin, begin + length


def _blurred(mask: Mask, reach_px: int) -> NDArray[np.uint8]:
    """255 inside and 0 outside, with a ramp between that ends so many pixels from the edge."""
    opacity = Image.fromarray(mask.astype(np.uint8) * 255)
    # A box reaches as far as its radius; two in turn, as far as both, and without a kink.
    for radius in (reach_px // 2, reach_px - reach_px // 2):
        opacity = opacity.filter(ImageFilter.BoxBlur(radius))
    return np.asarray(opacity)


def _blended(old: Image.Image, new: Image.Image, opacity: NDArray[np.uint8]) -> Image.Image:
    share = opacity[:, :, None].astype(np.uint16)
    # In whole numbers: a share of 0 is the old byte, one of 255 the new.
    return Image.fromarray(
        ((np.asarray(old) * (255 - share) + np.asarray(new) * share + 127) // 255).astype(np.uint8)
    )
