"""stub"""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Canvas:
    picture: Image.Image
    working: Image.Image
    mask: np.ndarray | None = None

    def put_back(self, drawn: Image.Image) -> Image.Image:
        if self.mask is None:
            return drawn
        return Image.composite(drawn, self.picture, Image.fromarray(self.mask))


def prepare_canvas(picture, mask, *, mask_blur, mask_padding, native_size_px) -> Canvas:
    return Canvas(picture, picture, mask)
