"""A UNet's forward pass recorded once for each shape of its inputs, and replayed."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sdxl_worker.gpu import graph_memory

# For each UNet: of two sizes, alone, with a ControlNet, and in passes of 2, 4, 8 and 16 pictures
# that jobs share. Recording one costs as much as four passes.
MAX_SHAPES = 12
# What libraries set up or compile at first use must not end up in a recording.
WARM_UP_RUNS = 3

Key = tuple[tuple[torch.Size, torch.dtype], ...]

CONDITIONS = ("text_embeds", "time_ids")


class GraphedForward:
    """Takes the place of `UNet2DConditionModel.forward` as the SDXL pipelines call it."""

    def __init__(
        self,
        forward: Callable[..., Any],
        device: torch.device,
        *,
        with_residuals: bool = True,
    ) -> None:
        """
        Args:
            with_residuals: whether passes with what ControlNets add are recorded, too.
        """
        self._forward = forward
        self._with_residuals = with_residuals
        self._device = device
        self._graph = functools.lru_cache(maxsize=MAX_SHAPES)(self._record)

    @property
    def recorded(self) -> Callable[..., Any]:
        """What is recorded."""
        return self._forward

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, torch.Tensor],
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        **rest: Any,
    ) -> tuple[torch.Tensor]:
        """
        Args:
            timestep: on the device, without dimensions, or one for each row.
            down_block_additional_residuals: and the next, what ControlNets add.
            rest: what the pipelines pass and SDXL does not use. Where one is set, or there are more
                conditions than SDXL's own, as with an IP-Adapter, no graph is used.
        """
        has_residuals = mid_block_additional_residual is not None
        if (
            any(value is not None for name, value in rest.items() if name != "return_dict")
            or set(added_cond_kwargs) != set(CONDITIONS)
            or (has_residuals and not self._with_residuals)
        ):
            return self._forward(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
                down_block_additional_residuals=down_block_additional_residuals,
                mid_block_additional_residual=mid_block_additional_residual,
                **rest,
            )
        inputs = [
            sample,
            timestep,
            encoder_hidden_states,
            *(added_cond_kwargs[name] for name in CONDITIONS),
        ]
        if mid_block_additional_residual is not None:
            inputs += [*(down_block_additional_residuals or ()), mid_block_additional_residual]
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        # The next replay writes to the same memory, and some schedulers remember earlier outputs.
        return (self._graph(key)(*inputs).clone(),)

    def forget(self) -> None:
        """Free what the recordings hold. They are made again when they are needed."""
        self._graph.cache_clear()

    def _record(self, key: Key) -> Callable[..., torch.Tensor]:
        """
        Returns:
            The forward pass for inputs of these shapes; the next replay overwrites its output.
        """
        inputs = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in key]
        stream = torch.cuda.current_stream()
        _stream().wait_stream(stream)
        with torch.cuda.stream(_stream()):
            for _ in range(WARM_UP_RUNS):
                self._flat(*inputs)
        stream.wait_stream(_stream())
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: at the start they copy the refiner's weights to the GPU,
        # which a recording in the default mode, "global", forbids. A recording that fails would
        # leave this thread on the other stream: hence the outer context. All graphs share the
        # memory of their activations: one is replayed at a time, and its output is copied before
        # the next replay.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, graph_memory(), _stream(), capture_error_mode="thread_local"),
        ):
            output = self._flat(*inputs)

        def replay(*values: torch.Tensor) -> torch.Tensor:
            for place, value in zip(inputs, values, strict=True):
                place.copy_(value)
            graph.replay()
            return output

        return replay

    def _flat(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
        *residuals: torch.Tensor,
    ) -> torch.Tensor:
        added: dict[str, Any] = {}
        if residuals:
            *down, mid = residuals
            added["down_block_additional_residuals"] = down
            added["mid_block_additional_residual"] = mid
        return self._forward(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
            **added,
        )[0]


@functools.cache
def _stream() -> torch.cuda.Stream:
    """The stream that all recordings are made on."""
    return torch.cuda.Stream()


def forget_recordings(unets: Iterable[Any]) -> None:
    for unet in unets:
        if isinstance(unet.forward, GraphedForward):
            unet.forward.forget()
    # torch does not record into a pool that was given up and still holds something.
    graph_memory.cache_clear()
