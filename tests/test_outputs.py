"""The answer's form, and what a PNG tells of itself."""

import json
from typing import Any

import pytest
from PIL import Image

import sdxl_worker
from sdxl_worker.outputs import build_output, encode_png
from sdxl_worker.request import parse_request
from tests.support import PROMPT, data_uri, decoded, models, picture, pictures, run

JOB = {"prompt": PROMPT, "seed": 11, "num_inference_steps": 3, "refiner_inference_steps": 6}


def test_the_output_has_the_form_of_2_1_0_and_nothing_else() -> None:
    output = run({**JOB, "num_images": 2})
    assert list(output) == ["images", "image_url", "seed"]
    assert output["image_url"] == output["images"][0]
    assert [decoded(uri).size for uri in output["images"]] == [(128, 128)] * 2
    assert output["seed"] == 11
    assert json.loads(json.dumps(output, allow_nan=False)) == output


def test_the_size_is_the_one_asked_for_or_the_model_s_own() -> None:
    assert picture(**JOB).size == (128, 128)
    assert picture(**JOB, height=64, width=96).size == (96, 64)
    assert picture(**JOB, height=72).size == (128, 72)


def test_png_is_lossless() -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    [uri] = build_output([image], parse_request(JOB), model_name="m", metadata=True)["images"]
    assert decoded(uri).tobytes() == image.tobytes()


def text_chunks(image: Image.Image) -> dict[str, Any]:
    return dict(getattr(image, "text", {}))


def test_a_picture_found_on_disk_can_be_made_again() -> None:
    job_input = {
        "prompt": "a red circle\non a blue background, caf\u00e9 \u732b",
        "negative_prompt": "a square",
        "seed": 20,
        "num_images": 3,
        "height": 96,
        "width": 128,
        "scheduler": "K_EULER_ANCESTRAL",
        "num_inference_steps": 4,
        "guidance_scale": 5.5,
        "high_noise_frac": 0.6,
        "strength": 0.4,
        "refiner_inference_steps": 9,
    }
    third = pictures(**job_input)[2]
    request = json.loads(text_chunks(third)["request"])
    assert request == {**job_input, "seed": 22, "num_images": 1}
    # A batch rounds otherwise than a single picture; alone, it is the same to the last pixel.
    alone = picture(**request)
    assert picture(**json.loads(text_chunks(alone)["request"])).tobytes() == alone.tobytes()


def test_a_drawn_seed_is_in_the_picture() -> None:
    output = run({**JOB, "seed": None})
    request = json.loads(text_chunks(decoded(output["images"][0]))["request"])
    assert request["seed"] == output["seed"]


def test_the_picture_names_its_makers() -> None:
    chunks = text_chunks(picture(**JOB))
    assert chunks["Software"] == f"sdxl-worker {sdxl_worker.__version__}"
    assert chunks["model"] == models().name == "shapes"
    assert set(json.loads(chunks["versions"])) == {"diffusers", "torch", "transformers"}


def test_one_setting_switches_the_text_chunks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with_chunks = picture(**JOB)
    monkeypatch.setenv("PNG_METADATA", "false")
    without = picture(**JOB)
    assert text_chunks(without) == {}
    assert without.tobytes() == with_chunks.tobytes()


@pytest.mark.parametrize(
    ("image_url", "told"),
    [
        ("https://user:pw@example.com:8000/a.png?token=secret#x", "https://example.com:8000/a.png"),
        (data_uri(Image.new("RGB", (64, 64))), "data:image/png;base64"),
    ],
)
def test_neither_secrets_nor_the_input_picture_go_into_the_file(image_url: str, told: str) -> None:
    request = parse_request({"image_url": image_url})
    output = build_output([Image.new("RGB", (64, 64))], request, model_name="m", metadata=True)
    chunk = json.loads(text_chunks(decoded(output["image_url"]))["request"])
    assert chunk["image_url"] == told


def test_a_prompt_of_any_characters_is_kept() -> None:
    text = "".join(map(chr, [0x20AC, 0x1F600, 0x0A, 0x7F, 0x00, 0x41]))
    image = Image.new("RGB", (8, 8))
    data = encode_png(image, {"request": json.dumps({"prompt": text}, ensure_ascii=False)})
    again = decoded("data:image/png;base64," + __import__("base64").b64encode(data).decode())
    assert json.loads(text_chunks(again)["request"])["prompt"] == text
