"""Which models stay in memory, and where: on the card as long as they fit, then on the host, and
otherwise they are read from the disk again. The one that was used last is the last to go."""

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)
M = TypeVar("M")
Moved = TypeVar("Moved", contravariant=True)


class Memory(Protocol[Moved]):
    """What is done with models, and whether there is room for them."""

    def fits_card(self, size_bytes: int) -> bool: ...

    def fits_host(self, size_bytes: int) -> bool:
        """Whether so much more does."""

    def to_card(self, models: Moved) -> None: ...

    def to_host(self, models: Moved) -> None: ...

    def drop(self, models: Moved) -> None:
        """Free its memory, whoever still holds it."""


@dataclass
class _Kept(Generic[M]):
    models: M
    size_bytes: int
    on_card: bool


class ModelsKept(Generic[Key, M]):
    """For one thread, the one that draws, but for `get`."""

    def __init__(self, memory: Memory[M]) -> None:
        self._memory = memory
        self._kept: dict[Key, _Kept[M]] = {}  # the one that was used last comes last

    def get(self, key: Key) -> M | None:
        """The model, wherever in memory it is. In any thread."""
        kept = self._kept.get(key)
        return kept.models if kept else None

    def is_on_card(self, key: Key) -> bool:
        kept = self._kept.get(key)
        return kept is not None and kept.on_card

    def bring(
        self, key: Key, size_bytes: int, load: Callable[[], M], beside: Collection[Key] = ()
    ) -> M:
        """The model, on the card: from wherever it is, and for it others may have to go.

        Args:
            size_bytes: of a model that is not kept yet.
            load: from the disk, once there is room.
            beside: those that stay where they are, on the card or on the host.

        Raises:
            Exception: what `load` raises. The other models are kept.
        """
        kept = self._kept.pop(key, None)
        if kept is not None and kept.on_card:
            self._kept[key] = kept
            return kept.models
        self._make_room(kept.size_bytes if kept else size_bytes, beside)
        if kept is None:
            kept = _Kept(load(), size_bytes, on_card=True)
        else:
            try:
                self._memory.to_card(kept.models)
            except BaseException:
                self._memory.drop(kept.models)  # where its networks are now, nobody knows
                raise
            kept.on_card = True
        self._kept[key] = kept
        return kept.models

    def forget(self) -> None:
        """Keep none of them. Whoever holds one keeps it."""
        self._kept.clear()

    def _make_room(self, size_bytes: int, beside: Collection[Key]) -> None:
        for key, kept in list(self._kept.items()):
            if self._memory.fits_card(size_bytes):
                return
            if kept.on_card and key not in beside:
                self._move_out(key, kept, beside)

    def _move_out(self, key: Key, kept: _Kept[M], beside: Collection[Key]) -> None:
        """From the card to the host, where older ones go for it; or from memory, where that would
        not do."""
        on_host = [
            one for one, other in self._kept.items() if not other.on_card and one not in beside
        ]
        freed = sum(self._kept[one].size_bytes for one in on_host)
        if not self._memory.fits_host(kept.size_bytes - freed):
            self._drop(key)
            return
        for one in on_host:
            if self._memory.fits_host(kept.size_bytes):
                break
            self._drop(one)
        self._memory.to_host(kept.models)
        kept.on_card = False

    def _drop(self, key: Key) -> None:
        self._memory.drop(self._kept.pop(key).models)
