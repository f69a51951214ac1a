"""A picture, and the mask that belongs to it, are brought to the size that is drawn.

numpy is imported where it is needed: it would take the decoder, which starts anew for each
picture, twice the time to start, and 80 MB of its address space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from PIL import Image

from sdxl_worker.errors import RequestError

if TYPE_CHECKING:
    from sdxl_worker.inputs.masks import Mask

# Of a picture whose size nobody asked for.
MAX_AUTOMATIC_SIDE_PX = 2048

How = Literal["crop", "pad", "stretch"]
# Whether a picture's transparency is its mask; "if_any": only where something is transparent.
FromAlpha = bool | Literal["if_any"]


@dataclass(frozen=True)
class Fit:
    """How a picture came to its size. Sizes are (width, height) in pixels."""

    sent_size: tuple[int, int]
    """Of the picture as it was sent, upright."""
    size: tuple[int, int]
    how: How

    @property
    def box(self) -> tuple[float, float, float, float]:
        """What is used of the picture as it was sent: left, top, right, bottom."""
        (sent_width, sent_height), (width, height) = self.sent_size, self.size
        if self.how != "crop":
            return 0, 0, sent_width, sent_height
        scale = max(width / sent_width, height / sent_height)
        left = max(0, (sent_width - width / scale) / 2)
        top = max(0, (sent_height - height / scale) / 2)
        return left, top, sent_width - left, sent_height - top

    @property
    def inner_size(self) -> tuple[int, int]:
        """What `box` becomes; the rest of `size` is filled up from the edges."""
        (sent_width, sent_height), (width, height) = self.sent_size, self.size
        if self.how != "pad":
            return self.size
        scale = min(width / sent_width, height / sent_height)
        return max(1, round(sent_width * scale)), max(1, round(sent_height * scale))

    def of_picture(self, picture: Image.Image) -> Image.Image:
        if picture.size == self.size:
            return picture
        inner = picture.resize(self.inner_size, Image.Resampling.LANCZOS, box=self.box)
        if self.inner_size == self.size:
            return inner
        import numpy as np

        from sdxl_worker.inputs.masks import with_edges

        return Image.fromarray(with_edges(np.asarray(inner), self.size, self._offset))

    def of_mask(self, mask: Mask) -> Mask:
        """Of a mask of the shape of the picture as it was sent, in any size."""
        from sdxl_worker.inputs.masks import covering, with_edges

        height, width = mask.shape
        across, down = width / self.sent_size[0], height / self.sent_size[1]
        left, top, right, bottom = self.box
        box = (left * across, top * down, right * across, bottom * down)
        return with_edges(covering(mask, self.inner_size, box), self.size, self._offset)

    @property
    def _offset(self) -> tuple[int, int]:
        width, height = self.inner_size
        return (self.size[0] - width) // 2, (self.size[1] - height) // 2


def choose_fit(
    sent_size: tuple[int, int],
    field: str,
    *,
    height_px: int | None,
    width_px: int | None,
    how: How,
    bounds_px: tuple[int, int, int],
) -> Fit:
    """The size with the given sides; a side that is not given follows from the aspect ratio.

    With neither given, the picture keeps its size as far as the bounds allow. What is not scaled
    is rounded down to the multiple, as diffusers does.

    Args:
        field: the place of the picture in the request, for messages.
        how: counts where both sides are given.
        bounds_px: the smallest side, the largest side, and what each is a multiple of.

    Raises:
        RequestError: no size with this aspect ratio is within the bounds.
    """
    lowest, highest, multiple = bounds_px
    if width_px and height_px:
        return Fit(sent_size, (width_px, height_px), how)
    if width_px:
        scale = width_px / sent_size[0]
    elif height_px:
        scale = height_px / sent_size[1]
    else:
        scale = min(1.0, highest / max(sent_size))
        scale = max(scale, lowest / min(sent_size))
    if scale == 1 and not (width_px or height_px):
        width, height = (side // multiple * multiple for side in sent_size)
    else:
        width, height = (round(side * scale / multiple) * multiple for side in sent_size)
    size = (width_px or width, height_px or height)
    if min(size) < lowest or max(size) > highest:
        raise RequestError(
            f"{field}: a picture of {sent_size[0]} x {sent_size[1]} pixels would become "
            f"{size[0]} x {size[1]}, and each side must be from {lowest} to {highest}; "
            "give both height and width, or crop the picture"
        )
    return Fit(sent_size, size, "stretch")
