"""Long prompts count to their last word; short ones give what plain diffusers gives."""

import pytest
import torch

from sdxl_worker.drawing.prompts import Texts, encode_pair
from tests.support import difference, models, picture, plain_base

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
