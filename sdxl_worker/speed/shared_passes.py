"""Pictures of several jobs drawn side by side: what their UNets would do one after the other is
done in one pass.

Each drawing runs in a greenlet, a function that can stop in its middle and go on later, all on one
thread. Where it would call a UNet it stops, until the passes that all of them stand before are
done: those of one UNet, whose inputs have the same shape, as one. So a drawing begins and ends at
any pass of the others, with its own sampler, steps and guidance, and knows nothing of them.
"""

import contextvars
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from sdxl_worker.errors import let_go
from sdxl_worker.gpu import is_out_of_memory
from sdxl_worker.speed.cuda_graphs import GraphedForward

log = logging.getLogger(__name__)

Drawing = Callable[[], None]
"""Raises nothing: it hands over its own result."""


@dataclass(frozen=True)
class _Pass:
    """A call of a UNet as the SDXL pipelines make it."""

    unet: Any
    rows: tuple[torch.Tensor, ...]
    """Latents, states, pooled states and size conditioning, with one row for each picture, or two
    with guidance."""
    timestep: torch.Tensor
    rest: dict[str, Any]
    most_rows: int | None
    """That a pass has memory for; None: not known."""

    @property
    def kind(self) -> Any:
        """Passes of one kind can be one."""
        rest = tuple(sorted((name, value) for name, value in self.rest.items()))
        return self.unet, tuple((one.shape[1:], one.dtype) for one in self.rows), rest

    @property
    def count(self) -> int:
        return len(self.rows[0])


class SharedUnet(torch.nn.Module):
    """What a drawing's pipelines call in place of a UNet. Hooks on it are the drawing's own."""

    def __init__(self, unet: Any, *, most_pictures: int | None = None) -> None:
        """
        Args:
            most_pictures: that a pass has memory for, with guidance; None: not known.
        """
        super().__init__()
        self._shared = [unet]  # in a list, or its weights would be this module's too
        self._most_rows = most_pictures and 2 * most_pictures

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._shared[0], name)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, torch.Tensor],
        **rest: Any,
    ) -> Any:
        conditions = (added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"])
        rows = (sample, encoder_hidden_states, *conditions)
        return getcurrent().parent.switch(
            _Pass(self._shared[0], rows, timestep, rest, self._most_rows)
        )


def draw_side_by_side(begin: Callable[[int], Iterable[Drawing]]) -> None:
    """Until all drawings are done.

    Args:
        begin: called before each pass with the number of drawings that are not done; gives those
            that begin now.
    """
    stopped: list[tuple[greenlet, _Pass]] = []
    too_many: dict[Any, int] = {}

    def go_on(function: Callable[..., _Pass | None], one: greenlet, *outcome: Any) -> None:
        asked = function(*outcome)
        if asked is not None:
            stopped.append((one, asked))

    # The drawings turn gradients off and back on, each for itself: they must be off before.
    with torch.no_grad():
        while True:
            for drawing in begin(len(stopped)):
                one = greenlet(drawing)
                # It would begin with an empty one: torch keeps its settings in such variables.
                one.gr_context = contextvars.copy_context()
                go_on(one.switch, one)
            if not stopped:
                return
            alike: dict[Any, list[tuple[greenlet, _Pass]]] = defaultdict(list)
            for one, asked in stopped:
                alike[asked.kind].append((one, asked))
            stopped.clear()
            for group in alike.values():
                outcomes = _outcomes([asked for _, asked in group], too_many)
                for (one, _), outcome in zip(group, outcomes, strict=True):
                    failed = isinstance(outcome, BaseException)
                    go_on(one.throw if failed else one.switch, one, outcome)


def _outcomes(passes: Sequence[_Pass], too_many: dict[Any, int]) -> list[Any]:
    """Of each pass its output, or what it raised. What fails together is tried in halves: they need
    less memory, and a fault of one drawing is not one of the others.

    Args:
        too_many: by kind, the fewest rows that there was no memory for; they are not tried again.
    """
    kind, count = passes[0].kind, sum(one.count for one in passes)
    if len(passes) > 1 and (count >= too_many.get(kind, count + 1) or _is_over_plan(passes, count)):
        return _in_halves(passes, too_many)
    try:
        return _run(passes)
    except BaseException as error:
        let_go(error)
        if len(passes) == 1:
            return [error]
        if is_out_of_memory(error):
            too_many[kind] = count
        log.warning("a pass of %d drawings failed: tried in halves", len(passes))
    return _in_halves(passes, too_many)


def _is_over_plan(passes: Sequence[_Pass], count: int) -> bool:
    most_rows, unet = passes[0].most_rows, passes[0].unet
    return most_rows is not None and count + _rows_to_add(unet, count) > most_rows


def _in_halves(passes: Sequence[_Pass], too_many: dict[Any, int]) -> list[Any]:
    half = len(passes) // 2
    return [*_outcomes(passes[:half], too_many), *_outcomes(passes[half:], too_many)]


def _run(passes: Sequence[_Pass]) -> list[Any]:
    first = passes[0]
    if len(passes) == 1:
        rows, timestep = list(first.rows), first.timestep
    else:
        # Timesteps are whole numbers with some samplers, with others not.
        every = [(*one.rows, one.timestep.float().expand(one.count)) for one in passes]
        more = _rows_to_add(first.unet, sum(one.count for one in passes))
        if more:
            every.append(tuple(column[:1].expand(more, *column.shape[1:]) for column in every[0]))
        *rows, timestep = (torch.cat(column) for column in zip(*every, strict=True))
    sample, states, pooled, time_ids = rows
    (output,) = first.unet(
        sample,
        timestep,
        states,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        **first.rest,
    )
    counts = [one.count for one in passes]
    return [(part,) for part in output[: sum(counts)].split(counts)]


def _rows_to_add(unet: Any, count: int) -> int:
    """Up to a power of two, for a UNet whose passes are recorded: each number of rows would be a
    recording of its own."""
    if not isinstance(unet.forward, GraphedForward):
        return 0
    return (1 << (count - 1).bit_length()) - count
