"""IP-Adapters: the UNet attends to a reference picture as it does to the prompt."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_worker.placement import Placement


@dataclass(frozen=True)
class ImagePrompt:
    """One entry of `ip_adapter`, ready to be drawn with."""


@contextlib.contextmanager
def with_image_prompts(
    pipeline: Any, prompts: Sequence[ImagePrompt], placement: Placement
) -> Iterator[dict[str, Any]]:
    """Around one stage of the base; gives further arguments of the pipeline."""
    yield {}
