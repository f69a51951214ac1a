"""ControlNets: what they read from a control picture is added to the UNet's own features."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdxl_worker.placement import Placement


@dataclass(frozen=True)
class Control:
    """One entry of `controlnet`, ready to be drawn with."""

    network: Any
    """A `ControlNetModel`, or a `ControlNetUnionModel`."""
    mode: int | None
    """Which of a union's types; None: it is no union."""
    map: Image.Image
    """RGB, of the size that is drawn."""
    scale: float
    start: float
    """And `end`: shares of the stage's schedule."""
    end: float


@contextlib.contextmanager
def controlled(pipeline: Any, controls: Sequence[Control], placement: Placement) -> Iterator[None]:
    """Around one stage of the base."""
    yield
