"""What speeds up a UNet's passes and does not go with ControlNets or IP-Adapters: such a job's base
is drawn without it, and the log says so. No picture is for it another than in a worker without.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from sdxl_worker.speed.compiling import Compiled
from sdxl_worker.speed.cuda_graphs import CONDITIONS, GraphedForward


class CompiledForward:
    """Takes the place of a UNet's `forward`: compiled for what every job passes. What ControlNets
    and IP-Adapters add would take code of its own, so those passes run without.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._compiled = Compiled(self._flat, "UNet")

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, Any],
        **rest: Any,
    ) -> Any:
        """As `GraphedForward`."""
        is_steered = any(
            value is not None for name, value in rest.items() if name != "return_dict"
        ) or set(added_cond_kwargs) != set(CONDITIONS)
        if is_steered:
            return self._forward(
                sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **rest
            )
        # The code is for one kind of timesteps. Samplers give whole numbers or others, and one for
        # all rows or, where jobs share a pass, one for each; the UNet makes the same of them first.
        return self._compiled(
            sample,
            timestep.float().expand(len(sample)),
            encoder_hidden_states,
            *(added_cond_kwargs[name] for name in CONDITIONS),
        )

    def _flat(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *conditions: torch.Tensor,
    ) -> Any:
        return self._forward(
            sample,
            timestep,
            encoder_hidden_states,
            added_cond_kwargs=dict(zip(CONDITIONS, conditions, strict=True)),
            return_dict=False,
        )


def compiled_where_it_can_be(
    unet: Any, *, image_prompts: bool
) -> contextlib.AbstractContextManager[Any]:
    """Around a stage. IP-Adapters have other code for attention, which stands in the blocks: torch
    would compile those anew, too."""
    if image_prompts and _has_compiled_blocks(unet):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def left_out(
    unet: Any, *, controls: bool, image_prompts: bool, step_cache_interval: int | None
) -> list[str]:
    """For the log: the settings that the base of a job goes without, and why.

    Args:
        unet: the base's.
        controls: whether it has any; as `image_prompts`.
        step_cache_interval: as `STEP_CACHE`.
    """
    asked = [
        name for name, is_on in (("controlnet", controls), ("ip_adapter", image_prompts)) if is_on
    ]
    if not asked:
        return []
    job = f"for the base of this job, which has {' and '.join(asked)}"
    lines = []
    if step_cache_interval is not None:
        lines.append(f"STEP_CACHE is left out {job}")
    if _is_compiled(unet):
        lines.append(f"COMPILE=full is left out {job}: its passes would be compiled anew")
    elif image_prompts:
        job = "for the base of this job, which has ip_adapter"
        if isinstance(unet.forward, GraphedForward):
            lines.append(f"CUDA graphs are left out {job}")
        if _has_compiled_blocks(unet):
            lines.append(f"COMPILE=blocks is left out {job}: they would be compiled anew")
    return lines


def _is_compiled(unet: Any) -> bool:
    forward = unet.forward
    inner = forward.recorded if isinstance(forward, GraphedForward) else forward
    return isinstance(inner, CompiledForward)


def _has_compiled_blocks(unet: Any) -> bool:
    return any(module._compiled_call_impl is not None for module in unet.modules())
