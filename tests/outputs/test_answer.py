"""The answer's form, and what a picture that was drawn tells of itself."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sdxl_worker
from sdxl_worker.outputs.answer import build_output, data_uri
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.support import (
    PROMPT,
    decoded,
    models,
    picture,
    pictures,
    run,
)
from tests.support import data_uri as as_input

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


INPUT_PICTURE = as_input(Image.effect_noise((64, 64), 50).convert("RGB"))
OF_A_BASE: dict[str, dict[str, Any]] = {
    "default": {},
    "strength": {"strength": 0.5},
    "base": {"refiner_inference_steps": 0},
    "too few refiner steps": {"refiner_inference_steps": 2},
    "ensemble without refiner": {"refiner_inference_steps": 0, "high_noise_frac": 0.8},
    "unchanged": {"image_url": INPUT_PICTURE, "strength": 0},
}
OF_A_REFINER: dict[str, dict[str, Any]] = {
    **OF_A_BASE,
    "ensemble": {"high_noise_frac": 0.5},
    "refine": {"image_url": INPUT_PICTURE, "strength": 0.5},
}


@pytest.mark.parametrize(
    ("with_refiner", "mode"),
    [*((False, mode) for mode in OF_A_BASE), *((True, mode) for mode in OF_A_REFINER)],
)
def test_a_picture_s_own_request_makes_it_again_where_it_was_made_and_beside_a_refiner(
    with_refiner: bool, mode: str, tmp_path: Path
) -> None:
    (tmp_path / "base").symlink_to(EMBEDDED_MODEL_DIR / "base")
    base_alone = {"MODEL_DIR": str(tmp_path)}
    whole: dict[str, str] = {}

    def on(worker: dict[str, str], **job_input: Any) -> Image.Image:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in worker.items():
                patch.setenv(name, value)
            return picture(**job_input)

    made_by = whole if with_refiner else base_alone
    job = {key: value for key, value in JOB.items() if key != "refiner_inference_steps"}
    made = on(made_by, **{**job, **OF_A_REFINER[mode]})
    again = json.loads(text_chunks(made)["request"])
    if "image_url" in again:  # which holds no input picture
        again["image_url"] = INPUT_PICTURE
    assert on(made_by, **again).tobytes() == made.tobytes()
    assert on(whole, **again).tobytes() == made.tobytes()


def test_the_last_picture_s_request_can_be_sent_also_at_the_largest_seed() -> None:
    _, second = pictures(**{**JOB, "seed": 2**64 - 1, "num_images": 2})
    request = json.loads(text_chunks(second)["request"])
    assert request["seed"] == 0
    assert picture(**request)


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
    monkeypatch.setenv("METADATA", "none")
    without = picture(**JOB)
    assert text_chunks(without) == {}
    assert without.tobytes() == with_chunks.tobytes()


def test_pictures_are_sent_as_the_request_says_or_else_as_the_owner_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sent(**fields: Any) -> str:
        uri = run({**JOB, **fields})["images"][0]
        header, _, payload = uri.partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(payload)))
        return f"{header} {image.format}"

    assert sent(output_format="jpeg") == "data:image/jpeg;base64 JPEG"
    assert sent() == "data:image/png;base64 PNG"
    monkeypatch.setenv("DEFAULT_OUTPUT_FORMAT", "webp")
    assert sent() == "data:image/webp;base64 WEBP"
    assert sent(output_format="png") == "data:image/png;base64 PNG"


LINK = "https://example.com/a.png"


@pytest.mark.parametrize(
    ("images", "duplicate_first", "image_url"),
    [
        ([data_uri(b"a", "png"), data_uri(b"b", "png")], True, data_uri(b"a", "png")),
        ([data_uri(b"a", "png")], False, None),
        ([LINK], True, LINK),
        ([LINK], False, LINK),
    ],
)
def test_the_first_picture_is_there_twice_unless_it_is_large_and_not_wanted(
    images: list[str], duplicate_first: bool, image_url: str | None
) -> None:
    request = parse_request({"prompt": PROMPT, "seed": 4, "duplicate_first": duplicate_first})
    expected = {"images": images, "image_url": image_url, "seed": 4}
    if image_url is None:
        del expected["image_url"]
    assert build_output(images, request) == expected
    assert build_output(images, request, warning="w") == {**expected, "warning": "w"}
