"""Pictures that steer a drawing: control pictures, and pictures as prompts."""

from dataclasses import dataclass

from PIL import Image

from sdxl_worker.inputs.masks import Mask


@dataclass(frozen=True)
class References:
    """In the order of the request's lists."""

    controls: tuple[Image.Image, ...] = ()
    """RGB, of the size that is drawn: maps, or what maps are made of."""
    image_prompts: tuple[Image.Image, ...] = ()
    """RGB, of any size."""
    image_prompt_masks: tuple[Mask | None, ...] = ()
    """[height, width] of what is drawn: true is where the picture counts. None: everywhere."""


NO_REFERENCES = References()
