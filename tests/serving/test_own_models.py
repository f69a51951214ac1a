"""LoRAs, embeddings, models, samplers and prompts of a job's own: with everything that a job can
ask for, or refused by a written rule; and nothing of them stays."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.own_files import WORD, write_embedding, write_lora
from tests.support import data_uri, decoded, largest_difference, noise_picture, run
from tools.original_format import base_checkpoint, save

SIZE = (64, 64)


def _mask() -> Image.Image:
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).rectangle((8, 16, 47, 55), fill=255)
    return mask


PLAIN: dict[str, Any] = {
    "prompt": f"a red circle on a blue background {WORD}",
    "negative_prompt": "a green (star)",
    "seed": 11,
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "refiner_inference_steps": 0,
}
PICTURE = {"image_url": data_uri(noise_picture(*SIZE))}
WAYS: dict[str, dict[str, Any]] = {
    "text": {},
    "refined": {"refiner_inference_steps": 4, "strength": 0.5},
    "ensemble": {"high_noise_frac": 0.5, "refiner_inference_steps": 4},
    "refine": {**PICTURE, "refiner_inference_steps": 4, "strength": 0.5},
    "img2img": {**PICTURE, "mode": "img2img"},
    "inpaint": {**PICTURE, "mask_url": data_uri(_mask())},
    "only the mask": {**PICTURE, "mask_url": data_uri(_mask()), "mask_padding": 8},
    "two pictures": {"num_images": 2},
}
ADDED: dict[str, dict[str, Any]] = {
    "loras": {"loras": [{"path": "one.safetensors"}, {"path": "two.safetensors", "scale": -0.5}]},
    "embeddings": {"embeddings": [{"path": "word.safetensors", "token": WORD}]},
    "model": {"model": "other"},
    "scheduler": {"scheduler": "Euler a"},
    "schedule": {"scheduler": "DPM++ 2M", "schedule": "karras"},
    "prompt_2": {"prompt_2": "a yellow star", "negative_prompt_2": "a red square"},
    "prompt_weighting": {"prompt_weighting": True},
    "clip_skip": {"clip_skip": 3},
    "guidance_rescale": {"guidance_rescale": 0.7},
}
# By what is added, and the way.
REFUSED = {
    (
        "loras",
        "refine",
    ): "loras: are for the base, and image_url alone is for the refiner: add mode img2img",
    ("model", "refine"): "image_url: needs the refiner, and this model has none",
    ("model", "refined"): "refiner_inference_steps: needs the refiner, and this model has none",
    ("model", "ensemble"): "high_noise_frac, refiner_inference_steps: needs the refiner",
}
EVERYTHING = {
    name: value
    for fields in ADDED.values()
    for name, value in fields.items()
    if name not in ("model", "scheduler")
} | {"scheduler": "DPM++ 2M"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for name in ("loras", "models"):
        (folder / name).mkdir()
    write_lora(folder / "loras" / "one.safetensors", seed=1)
    write_lora(folder / "loras" / "two.safetensors", seed=2, texts=False)
    write_embedding(folder / "loras" / "word.safetensors", seed=3)
    tensors = base_checkpoint(EMBEDDED_MODEL_DIR / "base")
    tensors["model.diffusion_model.out.2.weight"] *= 1.1
    save(tensors, folder / "models" / "other.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIR", str(folder / "loras"))
    monkeypatch.setenv("MODELS_DIR", str(folder / "models"))


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Image.Image]]:
    """What each way gives where nothing is added, by its name."""
    return {}


def drawn(job_input: dict[str, Any]) -> list[Image.Image]:
    output = run(job_input)
    assert "error" not in output, output["error"]
    return [decoded(uri) for uri in output["images"]]


def same(ones: list[Image.Image], others: list[Image.Image]) -> bool:
    return [one.tobytes() for one in ones] == [other.tobytes() for other in others]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("added", [*ADDED, "everything"])
def test_it_works_in_every_way_or_is_refused_by_a_rule_and_nothing_of_it_stays(
    added: str, way: str, plain: dict[str, list[Image.Image]]
) -> None:
    fields = EVERYTHING if added == "everything" else ADDED[added]
    asked = {**PLAIN, **WAYS[way]}
    if way not in plain:
        plain[way] = drawn(asked)
    rule = REFUSED.get((added, way)) or REFUSED.get(
        ("loras", way) if "loras" in fields else ("", "")
    )
    if rule is not None:
        assert rule in run({**asked, **fields})["error"]
    else:
        pictures = drawn({**asked, **fields})
        assert len(pictures) == len(plain[way])
        assert max(map(largest_difference, pictures, plain[way])) > 2
        assert same(drawn({**asked, **fields}), pictures), "the same again"
    assert same(drawn(asked), plain[way])


def test_the_file_of_a_picture_makes_it_again() -> None:
    output = run({**PLAIN, **EVERYTHING})
    [picture] = [decoded(uri) for uri in output["images"]]
    assert isinstance(picture, PngImagePlugin.PngImageFile)
    again = json.loads(picture.text["request"])
    assert again["loras"] == [
        {"path": "one.safetensors", "scale": 1.0},
        {"path": "two.safetensors", "scale": -0.5},
    ]
    assert same(drawn(again), [picture])
    hashes = json.loads(picture.text["adapters"])
    assert sorted(hashes) == ["one.safetensors", "two.safetensors", "word.safetensors"]
    infotext = picture.text["parameters"]
    assert f'Lora hashes: "one: {hashes["one.safetensors"][:10]}, two: ' in infotext
    assert "<lora:one:1> <lora:two:-0.5>" in infotext
