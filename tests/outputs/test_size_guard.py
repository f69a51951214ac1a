"""The platform's limit: what fits is sent, what can be made to fit is, the rest is told."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs import size_guard
from sdxl_worker.outputs.answer import build_output, data_uri, encode_pictures
from sdxl_worker.outputs.size_guard import (
    LEAST_PNG_BYTES_PER_PIXEL,
    Fitted,
    check_expected_size,
    fit,
    result_bytes,
)
from sdxl_worker.request import Request, parse_request
from tests.outputs.samples import ABOUT, sample
from tests.support import PROMPT, error, replace_generate, run

JOB = {"prompt": PROMPT, "seed": 11, "num_inference_steps": 3, "refiner_inference_steps": 6}
MEGAPIXELS_4 = 2048 * 2048


@pytest.fixture(autouse=True)
def on_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "https://example.com")


def request_of(**fields: Any) -> Request:
    return parse_request({**JOB, **fields})


def answer_bytes(request: Request, output_format: OutputFormat, **options: Any) -> int:
    """Of the real answer's JSON."""
    pictures = [sample()] * request.num_images
    files = encode_pictures(pictures, request, output_format=output_format, about=ABOUT, **options)
    output = build_output([data_uri(data, output_format) for data in files], request)
    size = len(json.dumps({"output": output}))
    assert result_bytes(files, request, output_format) == size
    return size


def fitted(
    request: Request, output_format: OutputFormat, limit: int, monkeypatch: pytest.MonkeyPatch
) -> Fitted:
    """What is sent of `sample()`, with an answer that is as large as its size is said to be."""
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", limit)
    pictures = [sample()] * request.num_images
    how: Any = {"output_format": output_format, "about": ABOUT}
    files = encode_pictures(pictures, request, **how)
    found = fit(pictures, files, request, "job", **how)
    images = [data_uri(data, found.output_format) for data in found.files]
    output = build_output(images, request, warning=found.warning)
    assert len(json.dumps({"output": output})) <= limit
    return found


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


# --- the limit ---------------------------------------------------------------------------------


def test_the_limit_is_that_of_the_route_the_job_came_by(monkeypatch: pytest.MonkeyPatch) -> None:
    assert size_guard.limit_bytes("5c7b-e1") == 10_000_000
    assert size_guard.limit_bytes("sync-5c7b-e1") == 20_000_000
    monkeypatch.delenv("RUNPOD_WEBHOOK_GET_JOB")
    assert size_guard.limit_bytes("5c7b-e1") is None
    assert size_guard.limit_bytes("sync-5c7b-e1") is None


def test_a_load_balancing_endpoint_has_a_limit_of_its_own_and_no_other_routes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RUNPOD_WEBHOOK_GET_JOB")
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "e1")
    assert size_guard.limit_bytes("sync-5c7b-e1") == 30_000_000
    with pytest.raises(RequestError) as caught:
        check_expected_size(request_of(num_images=16), 2**24, "png", "job")
    assert "the platform takes 30 MB; each of these helps: " in str(caught.value)
    assert "run" not in str(caught.value)


@pytest.mark.parametrize("duplicate_first", [True, False])
@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_the_size_is_that_of_the_whole_answer(num_images: int, duplicate_first: bool) -> None:
    request = request_of(num_images=num_images, duplicate_first=duplicate_first)
    for output_format in ("png", "jpeg", "webp"):
        answer_bytes(request, output_format)


def test_without_a_platform_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", 100)
    assert "the result" in error(JOB)
    monkeypatch.delenv("RUNPOD_WEBHOOK_GET_JOB")
    assert "images" in run(JOB)
    check_expected_size(request_of(num_images=16), 2**24, "png", "job")


# --- before the work ---------------------------------------------------------------------------


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
        assert 'output_format or on_too_large "jpeg"' in output["error"]


IMAGE_URL = {"image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("fields", "output_format", "refused"),
    [
        ({}, "png", True),
        ({}, "jpeg", False),
        ({}, "webp", False),
        ({"on_too_large": "jpeg"}, "png", False),
        ({"duplicate_first": False}, "png", False),
        ({**IMAGE_URL, "mode": "img2img"}, "png", True),
        ({**IMAGE_URL, "strength": 0.5}, "png", True),
        ({**IMAGE_URL, "strength": 0}, "png", False),
        ({**IMAGE_URL, "mask_url": "https://example.com/m.png"}, "png", False),
    ],
    ids=str,
)
def test_only_what_is_sure_is_refused_before_the_work(
    fields: dict[str, Any], output_format: OutputFormat, refused: bool
) -> None:
    request = request_of(num_images=3, **fields)
    if not refused:
        check_expected_size(request, MEGAPIXELS_4, output_format, "job")
        return
    with pytest.raises(RequestError, match="duplicate_first false"):
        check_expected_size(request, MEGAPIXELS_4, output_format, "job")
    check_expected_size(request, MEGAPIXELS_4, output_format, "sync-job")


def test_of_enlarged_pictures_less_a_pixel_is_sure() -> None:
    """MEGAPIXELS_4 is what comes out in each case."""
    fields: dict[str, Any] = {"num_images": 3, "duplicate_first": True}
    with pytest.raises(RequestError, match=r"at least 11\.2 MB"):
        check_expected_size(request_of(**fields), MEGAPIXELS_4, "png", "job")
    check_expected_size(request_of(**fields, upscale={"factor": 2}), MEGAPIXELS_4, "png", "job")
    fields["num_images"] = 5
    with pytest.raises(RequestError, match=r"at least 11\.9 MB.*a smaller upscale\.factor"):
        check_expected_size(request_of(**fields, upscale={"factor": 2}), MEGAPIXELS_4, "png", "job")
    with pytest.raises(RequestError, match=r"at least 16\.8 MB.*a smaller hires\.scale"):
        check_expected_size(request_of(**fields, hires={}), MEGAPIXELS_4, "png", "job")
    with pytest.raises(RequestError, match="smaller ones") as caught:
        check_expected_size(request_of(**fields, hires={"scale": 1}), MEGAPIXELS_4, "png", "job")
    assert "hires.scale" not in str(caught.value), "1 is the least there is"


@pytest.mark.parametrize("factor", [1.5, 2, 3, 4])
def test_what_is_sure_of_an_enlarged_picture_is_less_than_it_takes(factor: float) -> None:
    """Of the smoothest that a picture of SDXL may be: 1.5 bytes a pixel before."""
    side = 256
    random = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    common = np.fft.fft2(random.normal(size=(side, side)))
    bands = []
    for _ in range(3):
        own = np.fft.fft2(random.normal(size=(side, side)))
        band = np.fft.ifft2((common + 0.4 * own) / frequency**1.6).real
        bands.append(band / band.std() * 50 + 128)
    picture = Image.fromarray(np.stack(bands, 2).clip(0, 255).astype(np.uint8))
    larger = picture.resize((round(side * factor),) * 2, Image.Resampling.LANCZOS)
    request = request_of()
    [before], [after] = (
        encode_pictures([one], request, output_format="png", about=ABOUT, smallest=True)
        for one in (picture, larger)
    )
    assert len(before) / side**2 > size_guard.LEAST_PNG_BYTES_PER_PIXEL
    least = size_guard.LEAST_PNG_BYTES_PER_PIXEL / factor**0.5
    assert len(after) / (larger.width * larger.height) > least


def test_a_request_of_usual_size_is_not_refused() -> None:
    check_expected_size(request_of(num_images=4), 1024 * 1024, "png", "job")


def test_the_least_that_jpegs_take_is_below_any_limit() -> None:
    [data] = encode_pictures(
        [Image.new("RGB", (4096, 4096))],
        request_of(output_quality=1),
        output_format="jpeg",
        about=ABOUT,
    )
    assert 16 * len(data) * 4 / 3 < size_guard.RUN_LIMIT_BYTES


def test_a_check_has_no_size_to_refuse() -> None:
    report = run({**JOB, "check": True, "height": 64, "width": 64, "num_images": 8})
    assert "error" not in report


# --- after the work ----------------------------------------------------------------------------


def test_what_fits_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for output_format in ("png", "jpeg", "webp"):
        request = request_of(num_images=2)
        limit = answer_bytes(request, output_format)
        found = fitted(request, output_format, limit, monkeypatch)
        assert result_bytes(found.files, request, output_format) == limit
        assert (found.output_format, found.warning) == (output_format, None)


def test_a_png_over_the_limit_is_encoded_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(num_images=2)
    limit = answer_bytes(request, "png") - 1
    found = fitted(request, "png", limit, monkeypatch)
    assert (found.output_format, found.warning) == ("png", None)
    for data in found.files:
        image: Any = opened(data)
        assert np.array_equal(np.asarray(image), np.asarray(sample()))
        assert json.loads(image.text["request"])["prompt"] == PROMPT


def test_pngs_far_over_the_limit_are_not_encoded_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of(num_images=3)
    tried: list[int] = []

    def encode(pictures: list[Image.Image], *arguments: Any, **options: Any) -> list[bytes]:
        if options.get("smallest"):
            tried.append(len(pictures))
        return encode_pictures(pictures, *arguments, **options)

    monkeypatch.setattr(size_guard, "encode_pictures", encode)
    with pytest.raises(RequestError):
        fitted(request, "png", answer_bytes(request, "png") // 2, monkeypatch)
    assert tried == [1]


@pytest.mark.parametrize(
    ("output_format", "output_quality", "share"),
    [("png", 95, 0.5), ("png", 95, 0.3), ("png", 95, 0.1), ("jpeg", 100, 0.3), ("webp", 100, 0.2)],
)
def test_pictures_become_the_best_jpeg_that_fits_where_the_request_allows_it(
    output_format: OutputFormat, output_quality: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(on_too_large="jpeg", num_images=2, output_quality=output_quality)
    limit = int(share * answer_bytes(request, "png"))
    size = answer_bytes(request, output_format)
    assert size > limit
    found = fitted(request, output_format, limit, monkeypatch)
    assert found.output_format == "jpeg"
    assert {opened(data).format for data in found.files} == {"JPEG"}
    warning = str(found.warning)
    quality = int(warning.rpartition(" ")[2])
    assert warning == (
        f"as {output_format.upper()} the result is {size / 1e6:.1f} MB, and the platform takes "
        f"{limit / 1e6:.0f} MB: the pictures are JPEG of quality {quality}"
    )
    jpegs, better = (
        encode_pictures(
            [sample()] * 2, request, output_format="jpeg", about=ABOUT, quality=quality + more
        )
        for more in (0, 1)
    )
    assert found.files == jpegs
    if quality < output_quality:
        assert result_bytes(better, request, "jpeg", found.warning) > limit


def test_the_warning_has_to_fit_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(on_too_large="jpeg")
    limit = answer_bytes(request, "jpeg", quality=60) + 10
    found = fitted(request, "png", limit, monkeypatch)
    assert str(found.warning).endswith("JPEG of quality 59")


def test_the_quality_asked_for_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(on_too_large="jpeg", output_quality=40)
    limit = answer_bytes(request, "png") // 2
    found = fitted(request, "png", limit, monkeypatch)
    assert str(found.warning).endswith("JPEG of quality 40")


def test_no_jpeg_is_made_that_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(on_too_large="jpeg")
    limit = answer_bytes(request, "jpeg", quality=9)
    with pytest.raises(RequestError) as caught:
        fitted(request, "png", limit, monkeypatch)
    assert "jpeg" not in str(caught.value)
    assert "smaller ones" in str(caught.value)


@pytest.mark.parametrize("spare_bytes", [10, -10])
def test_a_result_over_the_limit_is_an_error_with_its_size_and_what_helps(
    spare_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of()
    single = answer_bytes(request_of(duplicate_first=False), "png", smallest=True)
    limit = single + spare_bytes
    with pytest.raises(RequestError) as caught:
        fitted(request, "png", limit, monkeypatch)
    without = f"duplicate_first false ({single / 1e6:.1f} MB); "
    assert str(caught.value) == (
        f"the result is {answer_bytes(request, 'png') / 1e6:.1f} MB, and the platform takes "
        f"{limit / 1e6:.0f} MB (10 for /run, 20 for /runsync); each of these helps: "
        f'on_too_large "jpeg" (quality 95, {answer_bytes(request, "jpeg") / 1e6:.1f} MB); '
        f"{without if spare_bytes > 0 else ''}/runsync; "
        "links in place of pictures, by upload_urls or the worker's BUCKET_ENDPOINT_URL; "
        "smaller ones (height, width)"
    )


def test_only_what_would_have_helped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError) as caught:
        fitted(request_of(), "png", 300, monkeypatch)
    message = str(caught.value)
    assert "on_too_large" not in message
    assert "duplicate_first" not in message
    assert "BUCKET_ENDPOINT_URL" in message


def test_a_job_s_answer_tells_that_its_pictures_are_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", 20_000)
    output = run({**JOB, "on_too_large": "jpeg"})
    assert output["images"][0].startswith("data:image/jpeg;base64,")
    assert list(output) == ["images", "image_url", "seed", "warning"]
    assert "JPEG of quality" in output["warning"]


def test_maps_count_before_any_work_with_the_least_that_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1:9/job-take/$ID?gpu=TEST")
    pixels = 64 * 64
    twice = int(2 * pixels * LEAST_PNG_BYTES_PER_PIXEL * 4 / 3)
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", twice + 10)
    check_expected_size(request_of(), pixels, "png", "job")
    with pytest.raises(RequestError, match="would be at least"):
        check_expected_size(request_of(), pixels, "png", "job", map_pixels=3 * pixels)
