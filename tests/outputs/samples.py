"""A picture to encode, and who made it."""

import numpy as np
from PIL import Image

from sdxl_worker.outputs.metadata import About

ABOUT = About("an/sdxl", "all", model_hash="31e35c80fc")


def smooth(height: int, width: int) -> np.ndarray:
    """Areas, edges and a little noise, as a picture has them."""
    y, x = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).normal(0, 3, (height, width))
    channels = [128 + 90 * np.sin(x / 97), 128 + 90 * np.cos(y / 61), 255.0 * ((x // 200) % 2)]
    return (
        np.stack([channel + grain for channel in channels], axis=-1).clip(0, 255).astype(np.uint8)
    )


def sample(side_px: int = 256) -> Image.Image:
    return Image.fromarray(smooth(side_px, side_px))
