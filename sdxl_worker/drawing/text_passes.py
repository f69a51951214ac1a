"""Passes of the text encoders. What a pass gave is kept for the next text with the same chunk."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_worker.adapters.embeddings import standing_in
from sdxl_worker.drawing.chunks import Chunk

# Of GPU memory, for each encoder: with SDXL in half precision, 70 chunks of the first encoder or 42
# of the second.
MAX_KEPT_BYTES = 8 * 1024**2


@dataclass(frozen=True)
class Pass:
    """What an encoder makes of a chunk."""

    hidden: torch.Tensor
    """Hidden states, [1, 77, width]."""
    pooled: torch.Tensor | None
    """Pooled and projected, [1, projection]. None: this encoder has no projection."""

    @property
    def size_bytes(self) -> int:
        return self.hidden.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


def run_pass(
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    chunk: Chunk,
    device: torch.device,
    *,
    layer: int,
    state: Hashable,
) -> Pass:
    """
    Args:
        layer: whose hidden states, counted from the last one, which is 1.
        state: tells apart what the encoder's weights may be at different times.
    """
    kept = _KEPT.setdefault(encoder, _Kept())
    key = (chunk.ids, chunk.words, layer, state)
    found = kept.find(key)
    if found is None:
        with standing_in(encoder, chunk.words):
            output = encoder(torch.tensor([chunk.ids], device=device), output_hidden_states=True)
        found = Pass(output.hidden_states[-layer], output.get("text_embeds"))
        kept.add(key, found)
    return found


@dataclass
class _Kept:
    passes: OrderedDict[Hashable, Pass] = field(default_factory=OrderedDict)
    """The one that was used last is the last."""
    size_bytes: int = 0

    def find(self, key: Hashable) -> Pass | None:
        if key in self.passes:
            self.passes.move_to_end(key)
        return self.passes.get(key)

    def add(self, key: Hashable, one: Pass) -> None:
        self.passes[key] = one
        self.size_bytes += one.size_bytes
        while self.size_bytes > MAX_KEPT_BYTES:
            _, oldest = self.passes.popitem(last=False)
            self.size_bytes -= oldest.size_bytes


# As long as an encoder lives.
_KEPT: WeakKeyDictionary[torch.nn.Module, _Kept] = WeakKeyDictionary()
