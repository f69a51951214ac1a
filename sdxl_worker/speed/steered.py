"""What speeds up a UNet's passes and does not go with ControlNets or IP-Adapters: such a job's base
is drawn without it, and the log says so. No picture is for it another than in a worker without.
"""

import contextlib
from typing import Any

import torch

from sdxl_worker.speed.cuda_graphs import CONDITIONS, GraphedForward


class CompiledForward:
    """Takes the place of a UNet's `forward`: compiled for what every job passes. For what
    ControlNets and IP-Adapters add, torch would compile it anew within the job, for minutes; so
    those passes are not compiled.
    """

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self._compiled = torch.compile(forward, fullgraph=True)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        is_steered = (
            options.get("mid_block_additional_residual") is not None
            or options.get("cross_attention_kwargs") is not None
            or set(options["added_cond_kwargs"]) != set(CONDITIONS)
        )
        return (self._forward if is_steered else self._compiled)(*inputs, **options)


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
