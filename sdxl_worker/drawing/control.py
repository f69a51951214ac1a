"""ControlNets: what they read from a control picture is added to the UNet's own features.

diffusers has pipelines of its own for this, one for each way of drawing. What they do before a pass
of the UNet is here a hook on it, so that every pipeline can be steered. A ControlNet is called only
in steps in which it counts; diffusers calls it in all of them, with a scale of 0 where it does not.
Of a union that was given several types, that scale is no zero: its features still reach the UNet.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_worker.drawing.schedulers import timesteps_cut_off
from sdxl_worker.drawing.stages import Stage
from sdxl_worker.loading.companions import at_work
from sdxl_worker.placement import Placement
from sdxl_worker.request import Request


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
    """Around one stage of the base. Nothing outlasts it.

    Within `timesteps_on_device`, and within `seeing` where the UNet takes a mask, so that their
    hooks have run before this one's.

    Args:
        pipeline: its UNet is called once for each timestep.
    """
    if not controls:
        yield
        return
    with contextlib.ExitStack() as at_work_now:
        steps = _Steps(pipeline, controls, placement, at_work_now)
        hook = pipeline.unet.register_forward_pre_hook(steps.add_residuals, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def warnings_of_controls(request: Request, stages: Sequence[Stage]) -> list[str]:
    """What the caller may not expect: in a short schedule, a share may hold no whole step."""
    told = []
    for i, one in enumerate(request.controlnet or ()):
        counts = [
            _counts(step, count, one.start, one.end)
            for stage in stages
            if stage.name == "base"
            for step in range(stage.steps)
            for count in [_steps_with_those_left(stage)]
        ]
        if not any(counts):
            told.append(
                f"controlnet[{i}]: has no effect, for none of the base's steps lies between start "
                f"({one.start:g}) and end ({one.end:g})"
            )
    return told


def _steps_with_those_left(stage: Stage) -> int:
    """Of a stage of the base, with those that it leaves to the refiner."""
    of_schedule = stage.options["num_inference_steps"]
    left = of_schedule - round(of_schedule * stage.options.get("denoising_end", 1))
    own = max(1, int(of_schedule * stage.options.get("strength", 1)) - left)
    return round(stage.steps * (own + left) / own)


def _counts(step: int, count: int, start: float, end: float) -> bool:
    """Whether a control counts in a step of so many, as in diffusers: a step that is only partly
    between start and end is none."""
    return step / count >= start and (step + 1) / count <= end


class _Steps:
    """Of one stage."""

    def __init__(
        self,
        pipeline: Any,
        controls: Sequence[Control],
        placement: Placement,
        at_work_now: contextlib.ExitStack,
    ) -> None:
        self._pipeline = pipeline
        self._controls = controls
        self._placement = placement
        self._at_work_now = at_work_now
        self._maps: dict[int, torch.Tensor] = {}
        """By the number of the control, [1, 3, height, width] from 0 to 1."""
        self._numbers: list[list[int]] = []
        """Of the controls that count, in each step that is left."""

    def add_residuals(
        self, _: Any, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A pre-hook of the UNet."""
        sample, timestep, *_ = inputs
        if not self._maps:
            self._begin(sample)
        numbers = self._numbers.pop(0)
        if not numbers:
            return None
        first, *others = self._calls(numbers)
        down, mid = self._residuals(first, sample, timestep, options)
        for together in others:
            more_down, more_mid = self._residuals(together, sample, timestep, options)
            for place, more in zip((*down, mid), (*more_down, more_mid), strict=True):
                place.add_(more)
        if not any(self._numbers):
            self._at_work_now.close()
        return inputs, {
            **options,
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }

    def _begin(self, sample: torch.Tensor) -> None:
        # diffusers' pipelines count so: of text-to-image the steps that `denoising_end` leaves to
        # the refiner as well, of image-to-image those that `strength` left.
        count = self._pipeline.num_timesteps + timesteps_cut_off(self._pipeline)
        self._numbers = [
            [
                number
                for number, control in enumerate(self._controls)
                if _counts(i, count, control.start, control.end)
            ]
            for i in range(count)
        ]
        height, width = (side * self._pipeline.vae_scale_factor for side in sample.shape[-2:])
        for number, control in enumerate(self._controls):
            self._maps[number] = _tensor_of(control.map, (width, height), sample)
        # Until the last step in which one of them counts.
        counting = {number for numbers in self._numbers for number in numbers}
        for network in {id(one := self._controls[i].network): one for i in counting}.values():
            self._at_work_now.enter_context(at_work(network, self._placement))

    def _calls(self, numbers: Sequence[int]) -> list[list[int]]:
        """Those of one union go together: it was trained to see several types at once. What needs
        the most memory comes first, as long as there are no other residuals."""
        calls: dict[Any, list[int]] = {}
        for number in numbers:
            control = self._controls[number]
            key = number if control.mode is None else id(control.network)
            calls.setdefault((control.mode is None, key), []).append(number)
        return [together for _, together in sorted(calls.items(), key=lambda one: one[0][0])]

    def _residuals(
        self,
        together: Sequence[int],
        sample: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """For each skip connection of the UNet, and for its middle."""
        first = self._controls[together[0]]
        network, rows = first.network, len(sample)
        maps = [self._maps[number].expand(rows, -1, -1, -1) for number in together]
        scales = [self._controls[number].scale for number in together]
        if first.mode is None:
            [given], [scale] = maps, scales
            own: dict[str, Any] = {"controlnet_cond": given, "conditioning_scale": scale}
        else:
            modes = [self._controls[number].mode for number in together]
            types = sample.new_zeros(rows, network.config.num_control_type)
            for mode in modes:
                types[:, mode].fill_(1)  # on the device: an assignment would copy the number there
            own = {
                "controlnet_cond": maps,
                "control_type": types,
                "control_type_idx": modes,
                "conditioning_scale": scales,
            }
        conditions = options["added_cond_kwargs"]
        down, mid = network(
            # A UNet for inpainting is given the mask and what surrounds it as well.
            sample[:, : network.config.in_channels],
            timestep,
            encoder_hidden_states=options["encoder_hidden_states"],
            added_cond_kwargs={name: conditions[name] for name in ("text_embeds", "time_ids")},
            return_dict=False,
            **own,
        )
        return list(down), mid


def _tensor_of(picture: Image.Image, size_px: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """From 0 to 1, copied without a wait: [1, 3, height, width]."""
    if picture.size != size_px:
        picture = picture.resize(size_px, Image.Resampling.LANCZOS)
    levels = torch.from_numpy(np.array(picture.convert("RGB"), np.float32) / 255)
    tensor = levels.permute(2, 0, 1)[None].contiguous().to(like.dtype)
    if like.device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(like.device, non_blocking=True)
