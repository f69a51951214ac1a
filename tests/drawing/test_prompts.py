"""Long prompts count to their last word; short ones give what plain diffusers gives."""

import dataclasses
import time
from typing import Any

import pytest
import torch

from sdxl_worker.adapters.embeddings import TextualInversion
from sdxl_worker.drawing.chunks import chunks_of
from sdxl_worker.drawing.prompts import (
    Encoding,
    Texts,
    check_clip_skip,
    encode_pair,
    warnings_of,
)
from sdxl_worker.errors import RequestError
from sdxl_worker.prompt_weights import parse
from sdxl_worker.request import parse_request
from tests.support import PROMPT, difference, fresh_models, models, picture, plain_base

# Any text of so many tokens: one letter a word, one token a letter.
FILLER = ["x"] * 75


@pytest.mark.parametrize(
    "prompt", ["", "a red circle", " ".join(FILLER), "CAPITALS and \u00fcml\u00e4uts, \u732b!"]
)
def test_a_prompt_that_fits_is_encoded_as_by_plain_diffusers(prompt: str) -> None:
    with torch.no_grad():
        embeds, _, pooled, _ = plain_base().encode_prompt(prompt, do_classifier_free_guidance=False)
        encoding, _ = encode_pair(Texts(prompt, ""), models())
    assert torch.equal(torch.cat([encoding.hidden_1, encoding.hidden_2], dim=-1), embeds)
    assert torch.equal(encoding.pooled, pooled)


@pytest.mark.parametrize(("tokens", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_chunks_of_75_tokens_are_joined(tokens: int, chunks: int) -> None:
    with torch.no_grad():
        both = encode_pair(Texts(" ".join(["x"] * tokens), ""), models())
    for encoding in both:
        assert encoding.hidden_1.shape[1] == encoding.hidden_2.shape[1] == 77 * chunks


def test_each_chunk_is_encoded_as_a_prompt_of_its_own() -> None:
    first, second = " ".join(FILLER), "a red circle on a blue background"
    with torch.no_grad():
        joined, _ = encode_pair(Texts(f"{first} {second}", ""), models())
        alone, other = encode_pair(Texts(first, second), models())
    assert torch.equal(joined.hidden_2, torch.cat([alone.hidden_2, other.hidden_2], dim=1))
    assert torch.equal(joined.hidden_1, torch.cat([alone.hidden_1, other.hidden_1], dim=1))
    assert torch.equal(joined.pooled, alone.pooled)


def test_the_shorter_of_the_pair_is_filled_with_empty_chunks() -> None:
    with torch.no_grad():
        positive, negative = encode_pair(Texts("a", " ".join(["x"] * 100)), models())
        short, empty = encode_pair(Texts("a", ""), models())
    assert positive.hidden_2.shape == negative.hidden_2.shape
    assert torch.equal(positive.hidden_2, torch.cat([short.hidden_2, empty.hidden_2], dim=1))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("refiner_steps", [0, 10], ids=["base", "refiner"])
def test_what_stands_after_token_77_changes_the_picture(field: str, refiner_steps: int) -> None:
    job_input = {"prompt": "a circle", "seed": 1, "num_inference_steps": 6}
    job_input["refiner_inference_steps"] = refiner_steps
    long = " ".join([*FILLER, "x x x"])
    same = picture(**{**job_input, field: f"{long} a red square"})
    other = picture(**{**job_input, field: f"{long} a blue star"})
    assert difference(same, other) > 0.2


def together(encoding: Encoding) -> torch.Tensor:
    return torch.cat([encoding.hidden_1, encoding.hidden_2], dim=-1)


def same(one: Encoding, other: Encoding) -> bool:
    return torch.equal(together(one), together(other)) and torch.equal(one.pooled, other.pooled)


def clip(text: str, which: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What plain transformers makes of a text: all hidden states, and the first output."""
    pipeline = plain_base()
    tokenizer = (pipeline.tokenizer, pipeline.tokenizer_2)[which]
    encoder = (pipeline.text_encoder, pipeline.text_encoder_2)[which]
    ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids, output_hidden_states=True)
    return output.hidden_states, output[0]


class TestSecondEncoder:
    def test_each_encoder_reads_its_own_text_as_in_plain_diffusers(self) -> None:
        with torch.no_grad():
            embeds, negative, pooled, negative_pooled = plain_base().encode_prompt(
                prompt="a circle",
                prompt_2="in red",
                negative_prompt="a star",
                negative_prompt_2="blue",
            )
        texts = Texts("a circle", "a star", "in red", "blue")
        for encoding, expected, its_pooled in zip(
            encode_pair(texts, models()),
            (embeds, negative),
            (pooled, negative_pooled),
            strict=True,
        ):
            assert torch.equal(together(encoding), expected)
            assert torch.equal(encoding.pooled, its_pooled)

    @pytest.mark.parametrize("field", ["prompt_2", "negative_prompt_2"])
    def test_a_longer_text_for_it_lengthens_all(self, field: str) -> None:
        longer: dict[str, Any] = {field: "x " * 80}
        for encoding in encode_pair(dataclasses.replace(Texts("a", "b"), **longer), models()):
            assert encoding.hidden_1.shape[1] == encoding.hidden_2.shape[1] == 154

    @pytest.mark.parametrize("refiner_steps", [0, 10], ids=["base", "refiner"])
    def test_it_changes_the_picture(self, refiner_steps: int) -> None:
        job_input = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 6}
        job_input["refiner_inference_steps"] = refiner_steps
        assert difference(picture(**job_input), picture(**job_input, prompt_2="a blue star")) > 0.2


class TestWeights:
    def test_each_token_s_hidden_states_are_multiplied(self) -> None:
        texts = Texts("x (x x:1.5) x", "[x] (x:0)", weighted=True)
        encodings = encode_pair(texts, models())
        for encoding, text, weights in zip(
            encodings, ("x x x x", "x x"), ([1, 1, 1.5, 1.5, 1], [1, 1 / 1.1, 0]), strict=True
        ):
            factors = torch.tensor(weights + [1] * (77 - len(weights)))[:, None]
            for which, hidden in enumerate((encoding.hidden_1, encoding.hidden_2)):
                hidden_states, first = clip(text, which)
                assert torch.equal(hidden, hidden_states[-2] * factors)
            assert torch.equal(encoding.pooled, first), "has no weights"

    def test_the_product_is_rounded_once(self) -> None:
        narrow = fresh_models(dtype=torch.bfloat16)
        weighted, _ = encode_pair(Texts("(x:1.3)", weighted=True), narrow)
        plain, _ = encode_pair(Texts("x"), narrow)
        expected = (plain.hidden_2[0, 1].float() * 1.3).bfloat16()
        assert torch.equal(weighted.hidden_2[0, 1], expected)

    def test_those_of_the_second_texts_too(self) -> None:
        prompt, negative = encode_pair(Texts("a", "b", "(x:2)", "(x:3)", weighted=True), models())
        states = clip("x", 1)[0][-2][0, 1]
        assert torch.equal(prompt.hidden_2[0, 1], states * 2)
        assert torch.equal(negative.hidden_2[0, 1], states * 3)

    def test_weights_stay_with_their_tokens_in_later_chunks(self) -> None:
        text = "x " * 80
        weighted, _ = encode_pair(Texts(f"{text} (x:1.2)", weighted=True), models())
        plain, _ = encode_pair(Texts(f"{text} x"), models())
        ratio = weighted.hidden_1 / plain.hidden_1
        assert ratio[0, 77 + 6].allclose(torch.tensor(1.2))
        ratio[0, 77 + 6] = 1
        assert ratio.eq(1).all()

    @pytest.mark.parametrize("weighted", [False, True])
    def test_text_without_any_syntax_is_as_ever(self, weighted: bool) -> None:
        texts = ("a red circle, on blue", "a star")
        [one, other] = encode_pair(Texts(*texts, weighted=weighted), models())
        assert torch.equal(together(one)[..., :48], clip(texts[0], 0)[0][-2])
        assert torch.equal(together(other)[..., 48:], clip(texts[1], 1)[0][-2])

    def test_without_weighting_brackets_are_brackets(self) -> None:
        text = r"a (red:1.5) [circle] \( BREAK <lora:x:1>"
        prompt, _ = encode_pair(Texts(text), models())
        for which, hidden in enumerate((prompt.hidden_1, prompt.hidden_2)):
            assert torch.equal(hidden, clip(text, which)[0][-2])

    def test_they_change_the_picture(self) -> None:
        job_input = {"prompt": "a (red:3) circle", "seed": 1, "num_inference_steps": 6}
        job_input["refiner_inference_steps"] = 0
        assert difference(picture(**job_input), picture(**job_input, prompt_weighting=True)) > 0.2

    def test_thousands_of_brackets_are_encoded_in_reasonable_time(self) -> None:
        chunks_of(parse("(a)b" * 5000), models().tokenizer)
        start = time.perf_counter()
        chunks_of(parse("(a)b" * 5000), models().tokenizer)
        assert time.perf_counter() - start < 3


class TestBreak:
    def test_what_follows_stands_in_a_chunk_of_its_own(self) -> None:
        joined, _ = encode_pair(Texts("a circle BREAK (in:1.1) red", weighted=True), models())
        first, second = encode_pair(Texts("a circle", "(in:1.1) red", weighted=True), models())
        assert torch.equal(together(joined), torch.cat([together(first), together(second)], dim=1))
        assert torch.equal(joined.pooled, first.pooled)

    @pytest.mark.parametrize("text", ["BREAK a", "a BREAK", " BREAK BREAK a BREAK "])
    def test_nothing_makes_no_chunk(self, text: str) -> None:
        assert same(
            encode_pair(Texts(text, weighted=True), models())[0],
            encode_pair(Texts("a"), models())[0],
        )


class TestClipSkip:
    @pytest.mark.parametrize(
        ("clip_skip", "diffusers_clip_skip"), [(None, None), (0, 0), (1, 0), (2, 0), (3, 1)]
    )
    def test_it_counts_as_a1111_does(
        self, clip_skip: int | None, diffusers_clip_skip: int | None
    ) -> None:
        with torch.no_grad():
            embeds, _, pooled, _ = plain_base().encode_prompt(
                PROMPT, clip_skip=diffusers_clip_skip, do_classifier_free_guidance=False
            )
        # Unlike in diffusers, the negative prompt is read at the same layer.
        for encoding in encode_pair(Texts(PROMPT, PROMPT), models(), clip_skip=clip_skip):
            assert torch.equal(together(encoding), embeds)
            assert torch.equal(encoding.pooled, pooled)

    def test_it_changes_the_picture(self) -> None:
        job_input = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 6}
        one, two, three = (picture(**job_input, clip_skip=clip_skip) for clip_skip in (1, 2, 3))
        assert difference(one, two) == 0
        assert difference(two, three) > 0.2

    @pytest.mark.parametrize("clip_skip", [None, 0, 1, 3])
    def test_layers_that_the_encoders_have_are_taken(self, clip_skip: int | None) -> None:
        check_clip_skip(parse_request({"prompt": "a", "clip_skip": clip_skip}), models())

    def test_layers_that_they_have_not_are_refused(self) -> None:
        with pytest.raises(RequestError, match="^clip_skip: the text encoders of .* 1 to 3 "):
            check_clip_skip(parse_request({"prompt": "a", "clip_skip": 4}), models())


class TestWarnings:
    def test_texts_without_anything_odd_have_none(self) -> None:
        assert warnings_of(Texts("a (red) circle", "<b>", "c", weighted=True)) == []

    @pytest.mark.parametrize("field", ["prompt", "negative_prompt", "prompt_2"])
    def test_others_networks_are_told(self, field: str) -> None:
        named: dict[str, Any] = {field: "b <lora:secret:1>"}
        texts = dataclasses.replace(Texts("a"), **named)
        [read] = warnings_of(texts)
        [left_out] = warnings_of(dataclasses.replace(texts, weighted=True))
        assert (
            read == f"{field}: <lora:...> and the like do nothing in a prompt; give LoRAs in loras"
        )
        assert "and were taken out" in left_out

    def test_words_that_stand_nowhere_are_told(self) -> None:
        inversion = TextualInversion("word(1)", (None, None))
        told = ["embeddings[0].token: stands in none of the prompts, so it had no effect"]
        assert warnings_of(Texts("a", "words(1)"), [inversion]) == told
        assert warnings_of(Texts("a", "b Word(1)c"), [inversion]) == []
        assert warnings_of(Texts("a", r"word\(1\)", weighted=True), [inversion]) == []


def test_a_request_s_texts() -> None:
    fields = {"prompt": "a", "negative_prompt": "b", "prompt_2": "c", "negative_prompt_2": "d"}
    request = parse_request({**fields, "prompt_weighting": True})
    assert Texts.of(request) == Texts(**fields, weighted=True)
    assert Texts.of(parse_request({"prompt": "a"})) == Texts("a")


def test_a_negative_prompt_for_either_encoder_is_one() -> None:
    assert Texts("a", "b").has_negative
    assert Texts("a", "", None, "b").has_negative
    assert not Texts("a", "", "b").has_negative
