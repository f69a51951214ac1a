"""Shallow steps, which run only a UNet's outermost level: faster, but another picture.

The deep features of adjacent steps are nearly the same. So every n-th step is a deep one, which
runs the UNet from end to end, and in the shallow steps between, the blocks below the outermost
level repeat their last output. That is DeepCache, https://arxiv.org/abs/2312.00858; the package of
that name has had no release since 2023, and diffusers' own caches are for transformers.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def step_cache(pipeline: Any, interval: int | None) -> Iterator[None]:
    """Around one stage, whose first step is a deep one. Nothing outlasts it.

    Args:
        pipeline: its UNet is called once a step.
        interval: steps from one deep step to the next; None for deep steps only.
    """
    if interval is None:
        yield
        return
    unet = pipeline.unet
    kept: dict[torch.nn.Module, Any] = {}
    steps = itertools.count(1)

    rows: set[int] = set()

    def before_step(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        # Where guidance ends, what was kept has rows for the negative prompt, too.
        count = len(inputs[0] if inputs else options["sample"])
        if count not in rows:
            kept.clear()
        rows.add(count)

    def after_step(*_: Any) -> None:
        # Freed before the next deep step, and before the decoder needs the memory.
        step = next(steps)
        if step % interval == 0 or step == pipeline.num_timesteps:
            kept.clear()

    with contextlib.ExitStack() as undo:
        undo.callback(unet.register_forward_pre_hook(before_step, with_kwargs=True).remove)
        undo.callback(unet.register_forward_hook(after_step).remove)
        deep = _below_the_outermost_level(unet)
        for block in deep:
            undo.callback(_set_back, block, vars(block).get("forward"))
            block.forward = _kept_forward(block, kept, is_read=block is deep[-1])
        yield


def _below_the_outermost_level(unet: Any) -> list[torch.nn.Module]:
    """The blocks, in the order they run. The outermost level reads only the last one's output."""
    outermost, *down = unet.down_blocks
    *up, _ = unet.up_blocks
    blocks = [*outermost.downsamplers, *down, unet.mid_block, *up]
    return [block for block in blocks if block is not None]  # a mid block may be missing


def _set_back(block: torch.nn.Module, own_forward: Callable[..., Any] | None) -> None:
    """
    Args:
        own_forward: what stood in place of its class's `forward`, if anything did.
    """
    if own_forward is None:
        del block.forward
    else:
        block.forward = own_forward


def _kept_forward(
    block: torch.nn.Module, kept: dict[torch.nn.Module, Any], *, is_read: bool
) -> Callable[..., Any]:
    forward = block.forward

    def kept_forward(*args: Any, **kwargs: Any) -> Any:
        if block in kept:
            return kept[block]
        output = forward(*args, **kwargs)
        kept[block] = output if is_read else _without_memory(output)
        return output

    return kept_forward


def _without_memory(output: Any) -> Any:
    """The shape of a block's output. Reading a number of it is an error."""
    if isinstance(output, tuple):
        return tuple(map(_without_memory, output))
    return torch.empty_like(output, device="meta")
