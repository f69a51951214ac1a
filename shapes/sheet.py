"""Many pictures on one, to look at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def contact_sheet(images: Sequence[Image.Image], columns: int = 10) -> Image.Image:
    """The pictures in rows, on grey."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), (128, 128, 128))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + 4), i // columns * (height + 4)))
    return sheet
