"""Texts of any length become chunks of as many tokens as an encoder reads at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import CLIPTokenizer

from sdxl_worker.adapters.embeddings import Word, pattern
from sdxl_worker.prompt_weights import Piece

# In place of the tokens of a word with vectors of its own. An encoder looks for the end of the text
# among the ids, for its first end token or for the highest id: this one is neither.
PLACEHOLDER = 0


@dataclass(frozen=True)
class Chunk:
    """What one pass reads: a start token, the text's tokens, an end token, padding."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    """One for each token."""
    words: tuple[tuple[int, Word], ...] = ()
    """Those with vectors of their own, each with the index of its first placeholder."""


def chunks_of(
    parts: Sequence[Sequence[Piece]], tokenizer: CLIPTokenizer, words: Sequence[Word] = ()
) -> list[Chunk]:
    """At least one chunk. Each part begins in a new one; one without any token makes none.

    The vectors of a word stand together in one chunk.
    """
    words = sorted(words, key=lambda word: len(word.token), reverse=True)
    parts_in_runs = [[run for piece in part for run in _runs(piece, words)] for part in parts]
    texts = [run for runs in parts_in_runs for run, _ in runs if isinstance(run, str)]
    # All in one call: thousands would take seconds. verbose=False: otherwise the tokenizer warns
    # that a text is longer than one pass takes.
    batch = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    ids_of_texts = iter(batch)
    room = tokenizer.model_max_length - 2
    drafts: list[_Draft] = []
    for runs in parts_in_runs:
        draft = None
        for run, weight in runs:
            if isinstance(run, Word):
                inseparable = [[PLACEHOLDER] * len(run.vectors)]
            else:
                inseparable = [[token] for token in next(ids_of_texts)]
            for ids in inseparable:
                if draft is None or len(draft.ids) + len(ids) > room:
                    draft = _Draft()
                    drafts.append(draft)
                if isinstance(run, Word):
                    draft.words.append((1 + len(draft.ids), run))
                draft.ids += ids
                draft.weights += [weight] * len(ids)
    return [draft.finish(tokenizer) for draft in drafts or [_Draft()]]


@dataclass
class _Draft:
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    words: list[tuple[int, Word]] = field(default_factory=list)

    def finish(self, tokenizer: CLIPTokenizer) -> Chunk:
        ids = [tokenizer.bos_token_id, *self.ids, tokenizer.eos_token_id]
        padding = tokenizer.model_max_length - len(ids)
        return Chunk(
            ids=(*ids, *[tokenizer.pad_token_id] * padding),
            weights=(1.0, *self.weights, *[1.0] * (1 + padding)),
            words=tuple(self.words),
        )


def _runs(piece: Piece, words: Sequence[Word]) -> Iterator[tuple[str | Word, float]]:
    """Text and words of a piece in turn, with its weight."""
    end = 0
    if words:
        for match in pattern([word.token for word in words]).finditer(piece.text):
            yield piece.text[end : match.start()], piece.weight
            yield words[(match.lastindex or 0) - 1], piece.weight
            end = match.end()
    yield piece.text[end:], piece.weight
