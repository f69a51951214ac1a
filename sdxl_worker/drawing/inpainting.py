"""What keeps a picture as it is where its mask is black, step after step.

diffusers has a pipeline of its own for this. It samples the mask instead of keeping all that is
white, encodes the picture once more for UNets that do not look at it, gives the pictures of a batch
other noise than each has alone, and where the refiner goes on with latents of the base, it takes
those for the picture.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sdxl_worker.drawing.stages import Stage

AfterStep = Callable[..., dict[str, Any]]


def takes_mask(unet: Any) -> bool:
    """Whether a UNet was trained for inpainting: it sees the mask, and what surrounds it."""
    return unet.config.in_channels > unet.config.out_channels


@contextlib.contextmanager
def seeing(unet: Any, repainted: torch.Tensor | None, surroundings: torch.Tensor) -> Iterator[None]:
    """Around the passes of a UNet that takes a mask: its further channels are filled.

    Args:
        repainted: [1, 1, h, w], or None: all of it.
        surroundings: latents, [pictures, 4, h, w].
    """
    mask = torch.ones_like(surroundings[:, :1])
    if repainted is not None:
        mask *= repainted
    condition = torch.cat([mask, surroundings], dim=1)

    def add_channels(_: Any, inputs: tuple[Any, ...]) -> Any:
        sample, *rest = inputs
        # With guidance, each picture is there twice.
        repeated = condition.repeat(len(sample) // len(condition), 1, 1, 1)
        return (torch.cat([sample, repeated], dim=1), *rest)

    hook = unet.register_forward_pre_hook(add_channels)
    try:
        yield
    finally:
        hook.remove()


class Keeper:
    """Of one batch: puts the picture back into the latents where it is not repainted, with as much
    noise as they have (https://arxiv.org/abs/2201.09865, without its repetitions).
    """

    def __init__(self, picture: torch.Tensor, repainted: torch.Tensor) -> None:
        """
        Args:
            picture: latents, [pictures, 4, h, w].
            repainted: [1, 1, h, w].
        """
        self._picture = picture
        self._repainted = repainted
        self.noise = torch.zeros_like(picture)
        """That the latents began with."""
        self._first = 0

    def start(self, latents: torch.Tensor, stage: Stage) -> torch.Tensor:
        """What a stage starts from. Of what is repainted wholly, nothing shows through: even at
        the first timestep, latents are not noise alone."""
        if stage.options.get("strength") == 1:
            return torch.where(self._repainted, torch.zeros_like(latents), latents)
        return latents

    def before(self, after_step: AfterStep, scheduler: Any) -> AfterStep:
        """The same for diffusers' `callback_on_step_end`, with the picture put back before.

        Args:
            scheduler: of the stage, before its pipeline moves its table to the device.
        """
        on_host = getattr(scheduler, "alphas_cumprod", None)  # some have sigmas alone

        def put_back(
            pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            measure = copy.copy(pipeline.scheduler)
            measure.alphas_cumprod = on_host
            kept = self._with_noise(measure, index, timestep)
            latents = torch.where(self._repainted, tensors["latents"], kept)
            tensors = {**tensors, "latents": latents}
            return tensors | after_step(pipeline, index, timestep, tensors)

        return put_back

    def _with_noise(self, scheduler: Any, index: int, timestep: torch.Tensor) -> torch.Tensor:
        """The picture with as much noise as is left after step `index` of a stage."""
        if index == 0:
            self._first = int((scheduler.timesteps == timestep).nonzero()[0])
        following = scheduler.timesteps[self._first + index + 1 :][:1]
        if not len(following):
            return self._picture
        # Told on the host: a number of the device would have to be waited for.
        one, zero = torch.ones(1), torch.zeros(1)
        of_picture = scheduler.add_noise(one, zero, following).item()
        of_noise = scheduler.add_noise(zero, one, following).item()
        return of_picture * self._picture + of_noise * self.noise
