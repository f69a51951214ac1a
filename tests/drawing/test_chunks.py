"""Where a text is cut, and where words with vectors of their own stand."""

import pytest
import torch

from sdxl_worker.adapters.embeddings import Word
from sdxl_worker.drawing.chunks import Chunk, chunks_of
from sdxl_worker.prompt_weights import Piece, parse
from tests.support import models


def chunks(text: str, *words: Word) -> list[Chunk]:
    return chunks_of(parse(text), models().tokenizer, words)


def word(token: str, vectors: int) -> Word:
    return Word(token, f"sha256 of {token}", torch.zeros(vectors, 48))


def places(text: str, *words: Word) -> list[list[tuple[int, str]]]:
    return [[(start, word.token) for start, word in one.words] for one in chunks(text, *words)]


def test_a_chunk_has_a_start_an_end_and_padding() -> None:
    tokenizer = models().tokenizer_2
    [chunk] = chunks_of([[Piece("x x")]], tokenizer)
    [x] = tokenizer("x", add_special_tokens=False).input_ids
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert chunk.ids == (start, x, x, end, *[padding] * 73)
    assert end != padding


def test_a_word_takes_a_place_for_each_vector_and_its_piece_s_weight() -> None:
    three = word("<three>", 3)
    [chunk] = chunks("x (x <three>:1.5) x", three)
    assert chunk.words == ((3, three),)
    assert chunk.weights == (1, 1, 1.5, 1.5, 1.5, 1.5, *[1] * 71)
    end = models().tokenizer.eos_token_id
    assert chunk.ids.index(end) == 7 == chunk.ids.index(max(chunk.ids)), "found either way"


@pytest.mark.parametrize(
    ("before", "vectors", "expected"),
    [
        (72, 3, [[(73, "w")]]),
        (73, 3, [[], [(1, "w")]]),
        (75, 1, [[], [(1, "w")]]),
        (0, 75, [[(1, "w")]]),
        (1, 75, [[], [(1, "w")]]),
    ],
)
def test_a_word_s_vectors_stand_in_one_chunk(
    before: int, vectors: int, expected: list[list[tuple[int, str]]]
) -> None:
    assert places("x " * before + "w", word("w", vectors)) == expected


def test_what_follows_a_word_that_did_not_fit_stands_behind_it() -> None:
    first, second = chunks("x " * 74 + "w x", word("w", 2))
    assert first.ids[75] == first.ids[76] == models().tokenizer.eos_token_id, "one place is left"
    assert second.words[0][0] == 1
    assert second.ids[3] == first.ids[1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a my-style b", [2]),
        ("My-Style, MY-STYLE.", [1, 3]),
        ("my-styles", []),
        ("amy-style", []),
        ("_my-style_", []),
        ("(my-style:1.2)", [1]),
        ("x\nmy-style\tx", [2]),
    ],
)
def test_a_word_is_found_whole_in_any_case(text: str, found: list[int]) -> None:
    [in_chunk] = places(text, word("my-style", 1))
    assert [start for start, _ in in_chunk] == found


def test_a_word_of_signs_is_found_anywhere() -> None:
    assert places("x<w>x (w) w", word("<w>", 1)) == [[(2, "<w>")]]
    assert places(r"x w\(1\)", word("w(1)", 1)) == [[(2, "w(1)")]]


def test_of_words_that_begin_alike_the_longest_is_found() -> None:
    words = word("my", 1), word("my-style", 1), word("my-style-2", 1)
    assert places("my-style-2 my my-style", *words) == [
        [(1, "my-style-2"), (2, "my"), (3, "my-style")]
    ]
