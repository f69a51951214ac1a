"""The denoising steps of a job, counted and reported as they are done."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_worker.speed.no_waits import StepsAhead


@dataclass(frozen=True)
class Step:
    """One denoising step that is done."""

    stage: str
    """"base", "hires" (the base's second pass) or "refiner"."""
    step: int
    steps: int
    """Of this stage."""
    percent: int
    """Of all steps of the request."""
    latents: Callable[[], torch.Tensor]
    """The pictures so far at unit scale, [pictures of the batch, 4, height / 8, width / 8]."""


class StepCounter:
    """Called by the pipelines after each step; calls `on_step`, whose exceptions end the work."""

    def __init__(
        self, on_step: Callable[[Step], None], planned: int, num_images: int, device: torch.device
    ) -> None:
        """
        Args:
            planned: steps of one picture.
            num_images: of the request.
        """
        self._on_step = on_step
        self._planned = planned
        self._num_images = num_images
        self._pictures_done = self._batch_size = self._done = 0
        self._steps_ahead = StepsAhead(device)

    def begin(self, pictures_done: int, batch_size: int) -> None:
        """A batch begins, perhaps not for the first time."""
        self._pictures_done, self._batch_size, self._done = pictures_done, batch_size, 0

    def callback(self, stage: str) -> Callable[..., dict[str, Any]]:
        """For one stage, in the form of diffusers' `callback_on_step_end`."""
        return functools.partial(self._after_step, stage)

    def _after_step(
        self, stage: str, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        self._steps_ahead.limit()
        self._done += 1
        steps_done = self._batch_size * min(self._done, self._planned)
        steps_done += self._pictures_done * self._planned
        percent = 100 * steps_done // (self._num_images * self._planned)
        # Between steps, the scheduler's input scaling is that of the step to come.
        scale = pipeline.scheduler.scale_model_input
        latents = functools.partial(scale, tensors["latents"], timestep)
        self._on_step(Step(stage, index + 1, pipeline.num_timesteps, percent, latents))
        return {}
