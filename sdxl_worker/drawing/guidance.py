"""Guidance that ends before the picture does: from then on a step is one pass, not two.

diffusers has a callback for this, `SDXLCFGCutoffCallback`. It keeps one row of the texts, however
many pictures there are, and leaves the tokens of IP-Adapters as they were: the next step fails. It
takes effect a step late, may cut a sampler's step of two calls in its middle, and begins anew
with each pipeline, though two of them may share a schedule. Here hooks on the UNet do it, and the
pipelines know nothing of it.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sdxl_worker.drawing.schedulers import timesteps_cut_off
from sdxl_worker.drawing.stages import Stage
from sdxl_worker.request import Request


@contextlib.contextmanager
def guided_until(pipeline: Any, end: float) -> Iterator[None]:
    """Around one stage. After the share `end` of its schedule, its UNet is given the prompt's rows
    alone, and their output stands for those of the negative prompt, too: guidance, which weighs the
    difference of both, then adds nothing.

    Before hooks that go by the number of rows.

    Args:
        pipeline: its UNet is called once for each timestep.
        end: as `Request.guidance_end`.
    """
    if end == 1:
        yield
        return
    rows = _Rows(pipeline, end)
    unet = pipeline.unet
    with contextlib.ExitStack() as undo:
        before = unet.register_forward_pre_hook(rows.leave_out, with_kwargs=True)
        undo.callback(before.remove)
        undo.callback(unet.register_forward_hook(rows.repeat).remove)
        yield


def warnings_of_guidance(request: Request, stages: Sequence[Stage]) -> list[str]:
    """What the caller may not expect of `guidance_end`."""
    end = request.guidance_end
    if end == 1:
        return []
    if request.guidance_scale <= 1:
        return [
            "guidance_end: has no effect with a guidance_scale of 1 or below; got "
            f"{request.guidance_scale:g}"
        ]
    if any(_guided_steps(_steps_of_schedule(stage), end) for stage in stages):
        return []
    negative = [name for name in ("negative_prompt", "negative_prompt_2") if getattr(request, name)]
    return [
        f"{name}: has no effect, for no step has guidance with a guidance_end of {end:g}"
        for name in negative or ["guidance_scale"]
    ]


def _steps_of_schedule(stage: Stage) -> int:
    """With those that another stage does; without those that `strength` leaves out."""
    return max(1, int(stage.options["num_inference_steps"] * stage.options.get("strength", 1)))


def _guided_steps(steps: int, end: float) -> int:
    """Of the steps of a schedule: a step that is only partly before `end` has none."""
    # Of 10 steps, 0.7 are 7: its binary fraction is a little below.
    return math.floor(steps * end + 1e-9)


class _Rows:
    """Of one stage."""

    def __init__(self, pipeline: Any, end: float) -> None:
        self._pipeline = pipeline
        self._end = end
        self._calls = 0
        self._guided_calls: int | None = None
        """None: not known before the first."""
        self._is_cut = False
        self._states: tuple[torch.Tensor, torch.Tensor] | None = None
        """Of both texts, and of the prompt alone: the same object in each step, for what keeps the
        keys of a text."""

    def leave_out(
        self, _: Any, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A pre-hook of the UNet."""
        if self._guided_calls is None:
            self._guided_calls = _guided_calls(self._pipeline, self._end)
        self._is_cut = (
            self._calls >= self._guided_calls and self._pipeline.do_classifier_free_guidance
        )
        self._calls += 1
        if not self._is_cut:
            return None
        sample, timestep, *rest = inputs
        conditions, states = options["added_cond_kwargs"], options["encoder_hidden_states"]
        if self._states is None or self._states[0] is not states:
            self._states = states, _second_half(states)
        return (_second_half(sample), timestep, *rest), {
            **options,
            "encoder_hidden_states": self._states[1],
            "added_cond_kwargs": {name: _second_half(one) for name, one in conditions.items()},
        }

    def repeat(self, _: Any, __: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """A hook after the UNet's pass."""
        return (output[0].repeat(2, 1, 1, 1),) if self._is_cut else None


def _second_half(rows: Any) -> Any:
    """The prompt's: those of the negative prompt come first."""
    if isinstance(rows, list):  # the tokens of IP-Adapters
        return [_second_half(one) for one in rows]
    return rows[len(rows) // 2 :]


def _guided_calls(pipeline: Any, end: float) -> int:
    """How many calls of the UNet have guidance, in a stage that is about to begin.

    Two stages that share a schedule are counted as one; of a stage that begins with new noise in
    mid-schedule, what it leaves out is not counted, as for `controlnet`.
    """
    scheduler = pipeline.scheduler
    total = pipeline.num_timesteps + timesteps_cut_off(pipeline)
    before = 0
    if getattr(pipeline, "denoising_start", None) is not None:
        before = len(scheduler.timesteps) - pipeline.num_timesteps
        total += before
    order = scheduler.order  # calls for one step, but for the last
    steps = math.ceil(total / order)
    return max(0, order * _guided_steps(steps, end) - before)
