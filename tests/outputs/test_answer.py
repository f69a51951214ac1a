"""The answer's form, and what a PNG tells of itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sdxl_worker
from sdxl_worker.outputs import answer
from sdxl_worker.outputs.answer import build_output
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.support import (
    PROMPT,
    data_uri,
    decoded,
    error,
    models,
    picture,
    pictures,
    replace_generate,
    run,
)

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


INPUT_PICTURE = data_uri(Image.effect_noise((64, 64), 50).convert("RGB"))
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
    _, second = pictures(**{**JOB, "seed": 2**53 - 1, "num_images": 2})
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


# --- size --------------------------------------------------------------------------------------


def test_the_limit_is_that_of_the_route_the_job_came_by() -> None:
    assert answer.limit_bytes("5c7b-e1") == 10_000_000
    assert answer.limit_bytes("sync-5c7b-e1") == 20_000_000


def test_a_result_over_the_limit_is_an_error_with_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_input = {**JOB, "num_images": 2}
    size = len(json.dumps({"output": run(job_input)}))
    monkeypatch.setattr(answer, "RUN_LIMIT_BYTES", size)
    assert "images" in run(job_input)
    monkeypatch.setattr(answer, "RUN_LIMIT_BYTES", size - 100)
    message = error(job_input)
    assert message.startswith(f"the result is {size / 1e6:.1f} MB, and the platform takes")
    assert "ask for fewer pictures (num_images) or smaller ones" in message


@pytest.mark.parametrize(("num_images", "fits"), [(1, True), (2, True), (3, False), (8, False)])
def test_what_is_bound_to_be_too_large_is_refused_before_it_is_made(
    num_images: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def generate(*_: Any, **__: Any) -> list[Image.Image]:
        made.append(1)
        return [Image.new("RGB", (8, 8))]

    replace_generate(monkeypatch, generate)
    output = run({**JOB, "height": 2048, "width": 2048, "num_images": num_images})
    assert bool(made) is fits
    assert ("error" in output) is not fits
    if not fits:
        assert output["error"].startswith("the result would be at least ")


def test_a_check_has_no_size_to_refuse() -> None:
    report = run({**JOB, "check": True, "height": 64, "width": 64, "num_images": 8})
    assert "error" not in report


def test_a_request_of_usual_size_is_not_refused() -> None:
    answer.check_expected_size(4, 1024 * 1024, "job")
