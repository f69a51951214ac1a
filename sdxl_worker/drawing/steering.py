"""What steers a drawing beside the prompt."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.image_prompts import ImagePrompt

Enlarge = Callable[[Image.Image, tuple[int, int]], Image.Image]
"""An RGB picture, and the width and height that it gets."""


@dataclass(frozen=True)
class Steering:
    controls: tuple[Control, ...] = ()
    """Those of scale 0 are left out: they change nothing."""
    image_prompts: tuple[ImagePrompt, ...] = ()
    """As `controls`."""
    enlarge: Enlarge | None = None
    """For the larger second pass."""


NO_STEERING = Steering()
