"""Textual inversion: what diffusers makes of it, with nothing left behind."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from sdxl_worker.adapters.embeddings import TextualInversion, read_embedding
from sdxl_worker.drawing.prompts import Encoding, Texts, encode_pair
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.adapter_files import AdapterFile
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import Placement
from sdxl_worker.safetensors_header import read_header
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.support import fresh_models, load, models, weights_being_read

WIDTHS = {"clip_l": 48, "clip_g": 64}
WORD = "<my-style>"

Read = Callable[..., TextualInversion]


def vectors(count: int, *names: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the size of real ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, WIDTHS[name], generator=generator) * 0.5
        for name in names or WIDTHS
    }


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes tensors to a file, and reads it as a job would."""

    def read(tensors: dict[str, torch.Tensor], token: str = WORD) -> TextualInversion:
        path = tmp_path / "a.safetensors"
        save_file(tensors, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        file = AdapterFile(path, digest, "its name", read_header(path))
        return read_embedding(file, token, "embeddings[0].path", models())

    return read


def together(encoding: Encoding) -> torch.Tensor:
    return torch.cat([encoding.hidden_1, encoding.hidden_2], dim=-1)


def plain_encoding(
    prompt: str, tensors: dict[str, torch.Tensor], *, clip_skip: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """By diffusers, which adds to a pipeline's tokenizers and matrices."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        EMBEDDED_MODEL_DIR / "base", variant="fp16", dtype=torch.float32, unet=None, vae=None
    )
    parts = {
        "clip_l": {"tokenizer": pipeline.tokenizer, "text_encoder": pipeline.text_encoder},
        "clip_g": {"tokenizer": pipeline.tokenizer_2, "text_encoder": pipeline.text_encoder_2},
    }
    for name, tensor in tensors.items():
        pipeline.load_textual_inversion({WORD: tensor}, token=WORD, **parts[name])
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip
        )
    return embeds, pooled


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "prompt",
    ["a red circle, {} on blue", "{}", "{} and {}", "x " * 72 + "{}", "x " * 71 + "{} x", "none"],
)
def test_a_word_gives_what_it_gives_in_diffusers(prompt: str, count: int, read: Read) -> None:
    prompt = prompt.format(WORD, WORD)
    tensors = vectors(count)
    encoding, _ = encode_pair(Texts(prompt), models(), embeddings=[read(tensors)])
    embeds, pooled = plain_encoding(prompt, tensors)
    torch.testing.assert_close(together(encoding), embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoding.pooled, pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_file_for_one_encoder_is_seen_by_that_one(name: str, read: Read) -> None:
    prompt, tensors = f"a red circle {WORD}", vectors(2, name)
    encoding, _ = encode_pair(Texts(prompt), models(), embeddings=[read(tensors)])
    embeds, pooled = plain_encoding(prompt, tensors)
    torch.testing.assert_close(together(encoding), embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoding.pooled, pooled, rtol=0, atol=1e-5)


def test_with_clip_skip(read: Read) -> None:
    prompt, tensors = f"a red circle {WORD}", vectors(2)
    encoding, _ = encode_pair(Texts(prompt), models(), embeddings=[read(tensors)], clip_skip=3)
    embeds, _ = plain_encoding(prompt, tensors, clip_skip=1)
    torch.testing.assert_close(together(encoding), embeds, rtol=0, atol=1e-5)


def test_its_weight_holds_for_all_its_vectors(read: Read) -> None:
    inversion = read(vectors(3))
    weighted = Texts(f"x ({WORD}:1.5) x", weighted=True)
    one, _ = encode_pair(weighted, models(), embeddings=[inversion])
    other, _ = encode_pair(Texts(f"x {WORD} x"), models(), embeddings=[inversion])
    factors = torch.ones(77, 1)
    factors[2:5] = 1.5
    assert torch.equal(together(one), together(other) * factors)


def test_in_the_negative_prompt_and_beside_others(read: Read) -> None:
    one, other = read(vectors(1, seed=1), "one"), read(vectors(2, seed=2), "other")
    texts = Texts("a one other", "another one", "other", "a other")
    both = encode_pair(texts, models(), embeddings=[one, other])
    in_turn = encode_pair(texts, models(), embeddings=[other, one])
    alone = encode_pair(texts, models(), embeddings=[one])
    assert all(map(torch.equal, map(together, both), map(together, in_turn)))
    assert torch.equal(both[1].hidden_1, alone[1].hidden_1), "only one is in it"
    assert not torch.equal(both[0].hidden_1, alone[0].hidden_1)
    assert not torch.equal(both[1].hidden_2, alone[1].hidden_2)


def test_another_file_of_the_same_word_is_another_encoding(read: Read) -> None:
    texts = Texts(f"a {WORD}")
    first, second = ({**vectors(2, seed=seed)} for seed in (1, 2))
    one = encode_pair(texts, models(), embeddings=[read(first)])[0]
    other = encode_pair(texts, models(), embeddings=[read(second)])[0]
    assert not torch.equal(one.hidden_1, other.hidden_1)


def state(some: Models) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Tensors, and what else a word could have been added to."""
    encoders = (some.text_encoder, some.text_encoder_2)
    tensors = {
        f"{index}.{name}": tensor.clone()
        for index, encoder in enumerate(encoders)
        for name, tensor in encoder.state_dict().items()
    }
    hooks = [
        (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        for encoder in encoders
        for module in encoder.modules()
    ]
    tokenizers = [
        (len(tokenizer), tokenizer.added_tokens_decoder.keys())
        for tokenizer in (some.tokenizer, some.tokenizer_2)
    ]
    return tensors, [hooks, tokenizers]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool, read: Read) -> None:
    fresh = fresh_models()
    plain = encode_pair(Texts(f"a {WORD}"), fresh)[0]
    tensors, others = state(fresh)
    texts = Texts(f"a red {WORD}")
    if fails:

        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError

        hook = fresh.text_encoder_2.text_model.encoder.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            encode_pair(texts, fresh, embeddings=[read(vectors(3))])
        hook.remove()
    else:
        encode_pair(texts, fresh, embeddings=[read(vectors(3))])
    after, others_after = state(fresh)
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert others_after == others
    assert torch.equal(together(encode_pair(Texts(f"a {WORD}"), fresh)[0]), together(plain))


def test_encoders_that_take_turns_on_the_device_see_it(read: Read) -> None:
    placement = Placement(torch.device("cpu", 0), torch.float32, resident=False)
    offloaded = load(dataclasses.replace(weights_being_read(), placement=placement))
    texts, inversion = Texts(f"a {WORD}"), read(vectors(2))
    one = encode_pair(texts, offloaded, embeddings=[inversion])[0]
    assert torch.equal(
        together(one), together(encode_pair(texts, models(), embeddings=[inversion])[0])
    )


def one_tensor(width: int, name: str = "emb_params") -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2, width)}


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        (vectors(3), [(3, 48), (3, 64)]),
        ({"clip_l": torch.zeros(48), "clip_g": torch.zeros(64)}, [(1, 48), (1, 64)]),
        ({"clip_l": torch.zeros(1, 48), "clip_g": torch.zeros(2, 64)}, [(1, 48), (2, 64)]),
        (
            {"text_encoders_0": torch.zeros(2, 48), "text_encoders_1": torch.zeros(2, 64)},
            [(2, 48), (2, 64)],
        ),
        (vectors(2, "clip_l"), [(2, 48), None]),
        (vectors(2, "clip_g"), [None, (2, 64)]),
        (one_tensor(64), [None, (2, 64)]),
        (one_tensor(64, "<name>"), [None, (2, 64)]),
        ({name: tensor.half() for name, tensor in vectors(1).items()}, [(1, 48), (1, 64)]),
        (vectors(75), [(75, 48), (75, 64)]),
    ],
)
def test_files_in_use_are_read(tensors: Any, shapes: list[Any], read: Read) -> None:
    words = read(tensors).words
    assert [word and tuple(word.vectors.shape) for word in words] == shapes


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (one_tensor(768), "is a textual inversion for Stable Diffusion 1.x (one tensor, 768 wide)"),
        (one_tensor(1024), "is a textual inversion for Stable Diffusion 2.x"),
        (one_tensor(48, "<name>"), "is a textual inversion for Stable Diffusion 1.x"),
        (one_tensor(100), "is no textual inversion for SDXL: it has 'emb_params'"),
        ({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, "does not fit"),
        ({"clip_l": torch.zeros(2, 48), "clip_g": torch.zeros(2, 48)}, "clip_g has shape [2, 48]"),
        ({"clip_l": torch.zeros(1, 2, 48)}, "clip_l has shape [1, 2, 48]"),
        ({"clip_l": torch.zeros(())}, "clip_l has shape []"),
        (vectors(76), "has 76 vectors in clip_l; a word may have 1 to 75"),
        ({"clip_l": torch.zeros(0, 48)}, "has 0 vectors in clip_l"),
        ({**vectors(1), "t5xxl": torch.zeros(1, 9)}, "it has 't5xxl', not only"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(1, 9)}, "is a LoRA; give it in loras"),
        ({f"tensor {i}": torch.zeros(1) for i in range(9)}, "'tensor 2' and 6 more"),
        ({}, "it has no tensors"),
        ({"clip_l": torch.full((1, 48), torch.nan)}, "values in clip_l that are no finite numbers"),
        ({"clip_l": torch.ones(1, 48, dtype=torch.int32)}, "values in clip_l"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tensors: Any, told: str, read: Read) -> None:
    with pytest.raises(RequestError) as refused:
        read(tensors)
    assert str(refused.value).startswith("embeddings[0].path: its name ")
    assert told in str(refused.value)


def test_a_file_that_is_gone_is_told_without_its_place(tmp_path: Path, read: Read) -> None:
    read(vectors(1))
    path = tmp_path / "a.safetensors"
    file = AdapterFile(path, "sha256", "its name", read_header(path))
    path.unlink()
    with pytest.raises(RequestError, match="^embeddings.0..path: its name cannot be read") as told:
        read_embedding(file, WORD, "embeddings[0].path", models())
    assert str(tmp_path) not in str(told.value)
