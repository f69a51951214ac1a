"""A UNet's forward pass recorded once for each shape of its inputs, and replayed.

The first pass of a shape is a pass like any other, on the stream of the recordings: it is their
warm-up. The second records, and replays what it recorded. So a shape that comes once is never
recorded, and one that comes again is, be it in the next step or in the next job of a single step. A
recording takes the host as long as a pass that it launches, and the GPU idles meanwhile (by
reading; not measured).

At the start, the base is recorded in the second step of its first picture, while threads may still
bring the refiner's weights. The refiner draws one step there; its first step in a job records it.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sdxl_worker.gpu import graph_memory, is_out_of_memory

log = logging.getLogger(__name__)

# For each UNet: of two sizes, alone, with a ControlNet, and in passes of 2, 4, 8 and 16 pictures
# that jobs share.
MAX_SHAPES = 12

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
        self._warmed_up: set[Key] = set()  # of a few hundred bytes each
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
        if key not in self._warmed_up:
            output = self._warm_up(inputs)
            self._warmed_up.add(key)
            return (output,)
        # The next replay writes to the same memory, and some schedulers remember earlier outputs.
        return (self._graph(key)(*inputs).clone(),)

    def forget(self) -> None:
        """Free what the recordings hold. They are made again when they are needed, after another
        warm-up: for weights that came back to other addresses, libraries may choose other kernels.
        """
        self._graph.cache_clear()
        self._warmed_up.clear()

    def _warm_up(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The forward pass, on the stream of the recordings. In a recording a library could neither
        make its handle or its workspace, which each stream has of its own, nor load or compile a
        kernel. All of that happens at the first pass of a shape: inference needs no further one.

        Memory belongs to the stream that it was allocated on, and is used again there. Each stream
        waits here for what the other has queued, so that what is freed on either is written to only
        after the other has read it: no tensor needs `record_stream`.
        """
        # Laid out as the recording's: for other strides torch would compile code of its own.
        inputs = [value.clone(memory_format=torch.contiguous_format) for value in values]
        stream = torch.cuda.current_stream()
        _stream().wait_stream(stream)
        try:
            with torch.cuda.stream(_stream()):
                output = self._flat(*inputs)
        finally:
            stream.wait_stream(_stream())
        # A copy, for what a caller keeps is to be memory of its own stream.
        return output.clone()

    def _record(self, key: Key) -> Callable[..., torch.Tensor]:
        """
        Returns:
            The forward pass for inputs of these shapes; the next replay overwrites its output.
            Where it cannot be recorded, it is run as it is.

        Raises:
            RuntimeError: there was no memory for it.
        """
        inputs = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in key]
        stream = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: at the start they copy the refiner's weights to the GPU,
        # which a recording in the default mode, "global", forbids. A recording that fails would
        # leave this thread on the other stream: hence the outer context. All graphs share the
        # memory of their activations: one is replayed at a time, and its output is copied before
        # the next replay.
        try:
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    graph, graph_memory(), _stream(), capture_error_mode="thread_local"
                ),
            ):
                output = self._flat(*inputs)
        except RuntimeError as error:
            self._end_recording()
            if is_out_of_memory(error):
                raise
            log.warning("a pass cannot be recorded as a CUDA graph, and runs without: %s", error)
            return self._flat

        def replay(*values: torch.Tensor) -> torch.Tensor:
            for place, value in zip(inputs, values, strict=True):
                place.copy_(value)
            graph.replay()
            return output

        return replay

    def _end_recording(self) -> None:
        """After one that failed. Where CUDA cannot end it, torch raises too early (by reading): it
        goes on recording to that memory, so that no later recording can share it, and no longer
        frees any memory that it keeps for reuse."""
        place = (self._device.index or 0, graph_memory())
        try:
            torch._C._cuda_endAllocateToPool(*place)
        except RuntimeError:
            return  # it has ended
        torch._C._cuda_releasePool(*place)
        graph_memory.cache_clear()

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
