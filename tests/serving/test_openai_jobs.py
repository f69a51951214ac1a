"""A call of OpenAI's API as a job: drawn as one of our own, and answered in OpenAI's form."""

import asyncio
import base64
import io
import json
import logging
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import ImagesResponse
from openai.types import Model as OpenAIModel
from PIL import Image, ImageDraw

import handler
from sdxl_worker.outputs import size_guard
from sdxl_worker.serving import ending, turn
from sdxl_worker.serving import progress as progress_module
from sdxl_worker.serving.answering import Outcome, answer
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.own_files import write_lora
from tests.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, S3Server
from tests.serving.conftest import Platform
from tests.support import PROMPT, data_uri, models, noise_picture, replace_generate, run

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
# Ours beside OpenAI's.
QUICK: dict[str, Any] = {
    "prompt": PROMPT,
    "seed": 7,
    "num_inference_steps": 4,
    "refiner_inference_steps": 0,
}
SIZE = (72, 64)
HOLE = (8, 16, 40, 48)


def call(route: str, job_id: str = "test", **fields: Any) -> dict[str, Any]:
    """The answer of a call that must succeed."""
    output = called(route, job_id, **fields)
    assert "error" not in output, output["error"]
    return output


def called(route: str, job_id: str = "test", **fields: Any) -> dict[str, Any]:
    job_input = {"openai_route": route, "openai_input": fields}
    return asyncio.run(handler.handler({"id": job_id, "input": job_input}))


def refusal(route: str, **fields: Any) -> str:
    output = called(route, **fields)
    assert list(output) == ["error", "error_type"]
    assert output["error_type"] == "invalid_request_error"
    return str(output["error"])


def files_in(output: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(one["b64_json"], validate=True) for one in output["data"]]


def opened(file: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(file))
    picture.load()
    return picture


def own_files(**fields: Any) -> list[bytes]:
    """What our own job gives."""
    output = run(fields)
    assert "error" not in output, output["error"]
    return [base64.b64decode(uri.partition(",")[2]) for uri in output["images"]]


def photo() -> Image.Image:
    picture = noise_picture(*SIZE)
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
    return picture


def erased(picture: Image.Image) -> Image.Image:
    """With a transparent hole in it."""
    picture = picture.convert("RGBA")
    picture.paste((0, 0, 0, 0), HOLE)
    return picture


def png(picture: Image.Image) -> str:
    """As most clients send it in JSON."""
    return data_uri(picture).partition(",")[2]


def in_hole() -> np.ndarray:
    mask = np.zeros(SIZE[::-1], bool)
    mask[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = True
    return mask


def test_the_pictures_are_those_of_our_own_job_byte_for_byte() -> None:
    output = call(GENERATIONS, **QUICK, n=2, size="72x64")
    assert files_in(output) == own_files(**QUICK, num_images=2, width=72, height=64)
    again = call(GENERATIONS, **{**QUICK, "seed": output["seed"] + 1}, size="72x64")
    assert np.abs(pixels(again, 0) - pixels(output, 1)).max() <= 2, "more than rounding"


def pixels(output: dict[str, Any], index: int) -> np.ndarray:
    return np.asarray(opened(files_in(output)[index]), np.int16)


def test_the_body_has_the_official_client_s_form_and_the_seed_beside_it() -> None:
    output = call(GENERATIONS, prompt=PROMPT, size="64x64", quality="low", num_inference_steps=2)
    response = ImagesResponse.model_validate(output, strict=True)
    assert response.created > 1_700_000_000
    assert (response.size, response.output_format, response.quality) == ("64x64", "png", "low")
    assert response.background == "opaque"
    assert response.data is not None
    assert [one.url for one in response.data] == [None]
    assert output["model"] == "shapes"
    assert 0 <= output["seed"] < 2**32
    assert "warning" not in output
    json.dumps(output, allow_nan=False)


@pytest.mark.parametrize(("output_format", "quality"), [("jpeg", 40), ("webp", 100), ("png", 40)])
def test_the_files_are_of_the_format_that_is_asked_for(output_format: str, quality: int) -> None:
    output = call(
        GENERATIONS,
        **QUICK,
        size="64x64",
        output_format=output_format,
        output_compression=quality,
    )
    own = {"output_format": output_format, "output_quality": quality}
    assert files_in(output) == own_files(**QUICK, width=64, height=64, **own)
    [file] = files_in(output)
    assert output["output_format"] == output_format
    assert opened(file).format == output_format.upper()


def test_a_quality_s_steps_are_those_that_are_drawn() -> None:
    for quality, own in (
        ("low", {"num_inference_steps": 15, "refiner_inference_steps": 0}),
        ("medium", {}),
    ):
        output = call(GENERATIONS, prompt=PROMPT, seed=3, size="64x64", quality=quality)
        assert files_in(output) == own_files(prompt=PROMPT, seed=3, width=64, height=64, **own)


def test_without_a_size_the_model_s_own_is_drawn() -> None:
    output = call(GENERATIONS, **QUICK, size="auto")
    assert output["size"] == "128x128"
    assert opened(files_in(output)[0]).size == (128, 128)


@pytest.mark.parametrize("mask", [erased(photo()), erased(Image.new("L", SIZE, 255))])
def test_an_edit_repaints_what_is_transparent_in_the_mask_alone(mask: Image.Image) -> None:
    output = call(EDITS, **QUICK, image=png(photo()), mask=png(mask))
    after, before = pixels(output, 0), np.asarray(photo())
    assert np.array_equal(after[~in_hole()], before[~in_hole()])
    assert np.abs(after[in_hole()] - before[in_hole()]).mean() > 5
    assert output["size"] == "72x64"
    white = Image.fromarray(in_hole().astype(np.uint8) * 255)
    own = {"image_url": data_uri(photo()), "mask_url": data_uri(white)}
    assert np.array_equal(after, np.asarray(opened(own_files(**QUICK, **own)[0])))


def test_without_a_mask_a_hole_in_the_picture_is_repainted_and_an_opaque_one_redrawn() -> None:
    holed, whole = data_uri(erased(photo())), data_uri(photo().convert("RGBA"))
    output = call(EDITS, **QUICK, image=[holed])
    assert files_in(output) == own_files(**QUICK, image_url=holed, mask_from_alpha=True)
    assert np.array_equal(pixels(output, 0)[~in_hole()], np.asarray(photo())[~in_hole()])
    output = call(EDITS, **QUICK, image=whole)
    assert files_in(output) == own_files(**QUICK, image_url=whole, mode="img2img")
    assert (pixels(output, 0) != np.asarray(photo())).mean() > 0.5


def test_an_edit_s_file_makes_it_again_as_a_job_of_our_own() -> None:
    holed, mask = data_uri(erased(photo())), data_uri(erased(photo()))
    whole = data_uri(photo())
    for fields, own in (
        ({"image": holed}, {"image_url": holed}),
        ({"image": whole, "mask": mask}, {"image_url": whole, "mask_url": mask}),
    ):
        [file] = files_in(call(EDITS, **QUICK, **fields))
        text: Any = opened(file)
        request = json.loads(text.text["request"])
        assert request["mask_from_alpha"] is True
        assert own_files(**{**request, **own}) == [file]


def test_an_edit_has_the_size_that_is_asked_for_or_that_of_its_picture() -> None:
    form = {"n": "2", "seed": "7", "num_inference_steps": "4", "refiner_inference_steps": "0"}
    picture = {"prompt": PROMPT, "image": png(photo())}
    output = call(EDITS, **picture, **form, size="64x64", strength="0.5")
    assert output["size"] == "64x64"
    own = {"image_url": data_uri(photo()), "mode": "img2img", "strength": 0.5}
    expected = own_files(**QUICK, **own, num_images=2, width=64, height=64)
    assert files_in(output) == expected, "numbers of a form are numbers"
    assert call(EDITS, **picture, **form)["size"] == "72x64"


def test_what_is_wrong_with_a_picture_is_told_by_the_caller_s_name() -> None:
    text = base64.b64encode(b"%PDF-1.7 and so on, no picture").decode()
    good = png(photo())
    for fields, told in (
        ({"image": text}, "image: not a picture that can be read (PDF)"),
        ({"image": f"data:image/png;base64,{good[:-99]}!"}, "image: what follows base64, is not"),
        ({"image": "http://127.0.0.1/a.png"}, "image: the worker connects to public"),
        ({"image": good, "mask": text}, "mask: not a picture that can be read (PDF)"),
        ({"image": good, "mask": good}, "mask: the picture has no transparency; erase in it what"),
        (
            {"image": good, "mask": png(photo().convert("RGBA"))},
            "mask: nothing in it is half transparent, so nothing would be repainted; erase",
        ),
        ({"image": good, "mask": png(erased(noise_picture(64, 128)))}, "mask: a mask of 64 x 128"),
        (
            {"image": png(Image.new("RGB", (64, 4100)))},
            "from 64 to 2048; give size, or crop",
        ),
    ):
        assert told in refusal(EDITS, **QUICK, **fields)


def test_the_owner_s_limits_and_models_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert refusal(GENERATIONS, **QUICK, model="sdxl").startswith(
        'model: this worker has one model, "shapes", and chooses among no others'
    )
    (tmp_path / "alone").symlink_to(EMBEDDED_MODEL_DIR / "base")
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("MODELS_DIR", str(tmp_path))
    listed = called("/v1/models")
    assert [one["id"] for one in listed["data"]] == ["shapes", "alone"]
    for one in listed["data"]:
        OpenAIModel.model_validate(one, strict=True)
    told = refusal(GENERATIONS, **QUICK, model="alon")
    assert '(did you mean alone?); it has "alone"; left out, the field means "shapes"' in told
    for name in ("alone", "shapes", "dall-e-3"):
        output = call(GENERATIONS, **QUICK, size="64x64", model=name)
        assert output["model"] == ("alone" if name == "alone" else "shapes")
    monkeypatch.setenv("MAX_STEPS", "3")
    assert refusal(GENERATIONS, **QUICK).startswith("num_inference_steps: must be 3 or less")
    models_of_the_owner = call(GENERATIONS, prompt=PROMPT, size="64x64", quality="high")
    text: Any = opened(files_in(models_of_the_owner)[0])
    assert json.loads(text.text["request"])["num_inference_steps"] == 25


def test_a_lora_of_the_owner_s_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_lora(tmp_path / "one.safetensors", 1)
    monkeypatch.setenv("LORA_DIR", str(tmp_path))
    loras: dict[str, Any] = {"loras": [{"path": "one.safetensors"}]}
    drawn = files_in(call(GENERATIONS, **QUICK, **loras, size="64x64"))
    assert drawn == own_files(**QUICK, **loras, width=64, height=64)
    form = {"image": png(photo()), "loras": json.dumps(loras["loras"])}
    assert files_in(call(EDITS, **QUICK, **form))


def test_what_is_not_used_is_told_beside_the_pictures() -> None:
    output = call(GENERATIONS, **QUICK, size="64x64", style="vivid", user="alice")
    assert output["warning"] == "style: not used here"


def test_prompts_and_users_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        fields = {**QUICK, "prompt": "a very private prompt", "user": "alice-4711"}
        call(GENERATIONS, **fields, size="64x64")
        refusal(GENERATIONS, **fields, size="1x1")
    text = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "test" in text
    assert "private" not in text
    assert "alice" not in text


def test_an_error_that_is_not_the_caller_s_has_no_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError

    replace_generate(monkeypatch, broken)
    output = called(GENERATIONS, **QUICK, size="64x64")
    assert list(output) == ["error"]
    assert output["error"].startswith("the worker failed at this job (RuntimeError)")


def test_a_worker_s_end_is_no_mistake_of_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_ends_at", 0.0)  # long ago
    output = called(EDITS, **QUICK, image=png(photo()))
    told = "the worker was told to end before the picture of image was there; send the job again"
    assert output == {"error": told}
    job = {"id": "own", "input": {**QUICK, "image_url": data_uri(photo())}}
    assert asyncio.run(answer(job)).outcome is Outcome.STOPPED


def test_progress_and_previews_are_sent_as_of_any_job(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_UPDATES", 0.0)
    call(GENERATIONS, **QUICK, size="64x64", preview=True)
    assert platform.updates
    for _, _, body in platform.updates:
        assert body["output"]["progress"]["stage"] == "base"
        assert body["output"]["preview"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("job_id", ["a-u1", "sync-a-e1"])
def test_the_answer_is_within_the_platform_s_limit_with_all_that_is_around_it(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, job_id: str
) -> None:
    assert platform.updates == []
    fields = {**QUICK, "num_inference_steps": 1, "n": 2, "size": "64x64"}

    def answered(limit_bytes: int, **more: str) -> tuple[dict[str, Any], int]:
        for name in ("RUN_LIMIT_BYTES", "RUNSYNC_LIMIT_BYTES"):
            monkeypatch.setattr(size_guard, name, limit_bytes)
        output = called(GENERATIONS, job_id, **fields, **more)
        return output, len(json.dumps({"output": output}))

    _, size = answered(10**7)
    smallest, size = answered(size - 1)
    assert "error" not in smallest, "PNGs may be made smaller"
    output, _ = answered(size - 1)
    assert "error" in output, "it would be over the limit by a byte"
    told = output["error"]
    assert told.startswith("the result ")
    assert "links in place of pictures, by response_format url with storage" in told
    assert "fewer pictures (n)" in told
    assert "smaller ones (size)" in told
    assert "num_images" not in told
    assert "duplicate_first" not in told
    smaller, size_of_smaller = answered(size - 1, on_too_large="jpeg")
    assert smaller["output_format"] == "jpeg"
    assert smaller["warning"].startswith("as PNG the result is")
    assert size_of_smaller < size
    assert all(opened(file).format == "JPEG" for file in files_in(smaller))


class TestStorage:
    @pytest.fixture(autouse=True)
    def _owner_s_bucket(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3.url)
        monkeypatch.setenv("BUCKET_NAME", "pics")
        monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", ACCESS_KEY_ID)
        monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)

    def test_links_come_where_they_are_asked_for_and_lead_to_the_same_pictures(self) -> None:
        fields = {**QUICK, "size": "64x64", "n": 2}
        linked = call(GENERATIONS, **fields, response_format="url")
        assert [list(one) for one in linked["data"]] == [["url"], ["url"]]
        assert linked["output_format"] == "png"
        got = []
        for one in linked["data"]:
            with urllib.request.urlopen(one["url"], timeout=10) as response:
                got.append(response.read())
        for response_format in ({}, {"response_format": "b64_json"}):
            assert files_in(call(GENERATIONS, **fields, **response_format)) == got

    def test_what_cannot_be_uploaded_is_in_the_answer_and_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BUCKET_NAME", "elsewhere")
        output = call(GENERATIONS, **QUICK, size="64x64", response_format="url")
        assert output["data"][0]["url"].startswith("data:image/png;base64,")
        assert output["warning"].startswith("1 of 1 pictures not uploaded: ")


def test_without_storage_a_link_is_the_picture_itself() -> None:
    fields = {**QUICK, "size": "64x64", "output_format": "webp"}
    output = call(GENERATIONS, **fields, response_format="url")
    with urllib.request.urlopen(output["data"][0]["url"]) as response:
        assert response.headers["Content-Type"] == "image/webp"
        assert response.read() == files_in(call(GENERATIONS, **fields))[0]


def test_calls_are_drawn_side_by_side_as_our_own_jobs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_JOBS", "2")
    models()
    kinds = []
    draw = turn.draw_on_gpu_thread

    async def recorded(draw_one: Any, kind: Any, at_once: int) -> Any:
        kinds.append((kind, at_once))
        return await draw(draw_one, kind, at_once)

    monkeypatch.setattr(turn, "draw_on_gpu_thread", recorded)
    call(GENERATIONS, **QUICK, size="64x64")
    run({**QUICK, "width": 64, "height": 64})
    assert kinds[0] == kinds[1]
    assert kinds[0][0] is not None
    assert kinds[0][1] == 2
