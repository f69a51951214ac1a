"""What steers a drawing beside the prompt."""

from dataclasses import dataclass

from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.image_prompts import ImagePrompt
from sdxl_worker.inputs.canvas import Enlarge


@dataclass(frozen=True)
class Steering:
    controls: tuple[Control, ...] = ()
    """Those of scale 0 are left out: they change nothing."""
    image_prompts: tuple[ImagePrompt, ...] = ()
    """As `controls`."""
    enlarge: Enlarge | None = None
    """For the larger second pass."""


NO_STEERING = Steering()
