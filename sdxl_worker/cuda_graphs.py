"""A UNet's forward pass recorded once for each shape of its inputs, and replayed."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

# Each recording keeps the memory of its activations: about what one picture of its size takes.
MAX_SHAPES = 4

Key = tuple[tuple[torch.Size, torch.dtype], ...]


class GraphedForward:
    """Takes the place of `UNet2DConditionModel.forward` as the SDXL pipelines call it."""

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._graph = functools.lru_cache(maxsize=MAX_SHAPES)(self._record)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, torch.Tensor],
        **rest: Any,
    ) -> tuple[torch.Tensor]:
        """
        Args:
            timestep: on the device, without dimensions.
            rest: what the pipelines pass and SDXL does not use: None, or the way without a graph.
        """
        if any(value is not None for name, value in rest.items() if name != "return_dict"):
            return self._forward(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
                **rest,
            )
        inputs = (
            sample,
            timestep,
            encoder_hidden_states,
            added_cond_kwargs["text_embeds"],
            added_cond_kwargs["time_ids"],
        )
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        # The next replay writes to the same memory, and some schedulers remember earlier outputs.
        return (self._graph(key)(*inputs).clone(),)

    def _record(self, key: Key) -> Callable[..., torch.Tensor]:
        inputs = tuple(torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in key)
        return cast(Any, torch.cuda.make_graphed_callables(self._flat, inputs))

    def _flat(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        return self._forward(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]
