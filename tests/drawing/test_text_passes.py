"""A chunk that comes again needs no second pass, and gets bit for bit what the first one gave."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sdxl_worker.drawing import text_passes
from sdxl_worker.drawing.prompts import Encoding, Texts, encode_pair
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from tests.support import REQUESTS, draw, fresh_models


@pytest.fixture
def fresh() -> Models:
    return fresh_models()


@pytest.fixture
def passes(fresh: Models) -> list[str]:
    """Which encoder ran, in turn."""
    ran: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        hook: Callable[..., None] = lambda *_, name=name: ran.append(name)  # noqa: E731
        getattr(fresh, name).register_forward_hook(hook)
    return ran


def tensors(*encodings: Encoding) -> Iterator[torch.Tensor]:
    for one in encodings:
        yield from (one.hidden_1, one.hidden_2, one.pooled)


def equal(one: tuple[Encoding, ...], other: tuple[Encoding, ...]) -> bool:
    return all(map(torch.equal, tensors(*one), tensors(*other)))


def test_the_same_texts_are_encoded_once(fresh: Models, passes: list[str]) -> None:
    texts = Texts("a (red:1.2) circle " * 30, "a star", weighted=True)
    first = encode_pair(texts, fresh)
    assert len(passes) == 2 * 4, "two chunks, one, and an empty one, but each only once"
    assert equal(encode_pair(texts, fresh), first)
    assert len(passes) == 2 * 4
    assert equal(first, encode_pair(texts, fresh_models())), "as of a fresh pass"


def test_of_texts_that_share_chunks_only_the_others_are_encoded(
    fresh: Models, passes: list[str]
) -> None:
    encode_pair(Texts("a red circle", "a star"), fresh)
    passes.clear()
    encode_pair(Texts("a red circle", "a blue star"), fresh)
    assert passes == ["text_encoder", "text_encoder_2"]
    passes.clear()
    encode_pair(Texts("a red circle", "a star", prompt_2="a ring"), fresh)
    assert passes == ["text_encoder_2"]


@pytest.mark.parametrize(
    "other",
    [
        {"clip_skip": 3},
        {"state": ("a LoRA",)},
        {"texts": Texts("a circle", "x")},
        {"texts": Texts("a red circle", "y")},
    ],
)
def test_whatever_changes_the_encoding_asks_for_another_pass(
    other: dict[str, Any], fresh: Models, passes: list[str]
) -> None:
    arguments: dict[str, Any] = {"texts": Texts("a red circle", "x")}
    first = encode_pair(**arguments, models=fresh)
    passes.clear()
    again = encode_pair(**{**arguments, **other}, models=fresh)
    assert passes
    assert equal(again, first) is (other.get("state") is not None)


def test_each_state_of_the_weights_has_its_own_encodings(fresh: Models) -> None:
    texts = Texts("a red circle", "x")
    before = encode_pair(texts, fresh)
    weight = fresh.text_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight")
    original = weight.detach().clone()
    with torch.no_grad():
        weight += 0.1
    changed = encode_pair(texts, fresh, state="patched")
    with torch.no_grad():
        weight.copy_(original)
    assert not equal(changed, before)
    assert equal(encode_pair(texts, fresh), before)
    assert equal(encode_pair(texts, fresh, state="patched"), changed)


def test_weights_need_no_pass_of_their_own(fresh: Models, passes: list[str]) -> None:
    encode_pair(Texts("a red circle", "x"), fresh)
    passes.clear()
    encode_pair(Texts("a (red:1.3) circle", "[x]", weighted=True), fresh)
    assert passes == []


@pytest.mark.parametrize("job_input", REQUESTS.values(), ids=REQUESTS)
def test_drawing_changes_nothing_that_is_kept(job_input: dict[str, Any], fresh: Models) -> None:
    request = parse_request({**job_input, "num_images": 2, "negative_prompt": "a star"})
    encodings = encode_pair(Texts.of(request), fresh)
    before = [tensor.clone() for tensor in tensors(*encodings)]
    [first, _] = draw(request, fresh)
    for encoding in encode_pair(Texts.of(request), fresh):
        for tensor in tensors(encoding):
            tensor.fill_(torch.nan)
    after = encode_pair(Texts.of(request), fresh)
    assert all(map(torch.equal, tensors(*after), before)), "what is handed out is a copy"
    assert draw(request, fresh)[0].tobytes() == first.tobytes()


def test_models_never_share_encodings(fresh: Models) -> None:
    other = fresh_models()
    with torch.no_grad():
        other.text_encoder_2.text_projection.weight *= 2
    one, doubled = (encode_pair(Texts("a", "b"), some)[0] for some in (fresh, other))
    assert torch.equal(one.hidden_2, doubled.hidden_2)
    assert torch.equal(one.pooled * 2, doubled.pooled)


def test_encodings_go_with_their_models() -> None:
    before = len(text_passes._KEPT)
    encode_pair(Texts("a", "b"), fresh_models())
    gc.collect()
    assert len(text_passes._KEPT) <= before


def test_what_is_kept_is_bounded_and_the_least_recently_used_goes(
    fresh: Models, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_pair(Texts("a", "a"), fresh)
    kept = text_passes._KEPT[fresh.text_encoder_2]
    monkeypatch.setattr(text_passes, "MAX_KEPT_BYTES", 3 * kept.size_bytes)
    for text in ("b", "c", "a", "d"):
        encode_pair(Texts(text, text), fresh)
        assert kept.size_bytes == sum(one.size_bytes for one in kept.passes.values())
    assert len(kept.passes) == 3
    passes.clear()
    encode_pair(Texts("c", "a"), fresh)
    assert "text_encoder_2" not in passes
    encode_pair(Texts("b", "a"), fresh)
    assert "text_encoder_2" in passes


def test_one_that_is_second_pass_than_all_room_is_encoded_all_the_same(
    fresh: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encode_pair(Texts("a", "b"), fresh_models())
    monkeypatch.setattr(text_passes, "MAX_KEPT_BYTES", 1)
    assert equal(encode_pair(Texts("a", "b"), fresh), expected)
    assert text_passes._KEPT[fresh.text_encoder].size_bytes == 0


def test_a_pass_that_fails_leaves_nothing(fresh: Models) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    hook = fresh.text_encoder.encoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        encode_pair(Texts("a", "b"), fresh)
    hook.remove()
    assert equal(encode_pair(Texts("a", "b"), fresh), encode_pair(Texts("a", "b"), fresh_models()))
