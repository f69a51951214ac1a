"""The files that pictures become: what comes out of them is what went in, within their quality."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs.files import encode
from tests.outputs.samples import sample

FORMATS: tuple[OutputFormat, ...] = ("png", "jpeg", "webp")


def opened(data: bytes) -> Any:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def psnr_db(data: bytes, picture: Image.Image) -> float:
    image = opened(data)
    assert (image.size, image.mode) == (picture.size, "RGB")
    difference = np.asarray(image, np.float64) - np.asarray(picture, np.float64)
    return float(10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)))


@pytest.mark.parametrize(
    ("output_format", "quality"), [("png", 1), ("png", 100), ("webp", 100)], ids=str
)
def test_lossless_is_lossless(output_format: OutputFormat, quality: int) -> None:
    data = encode(sample(), output_format, quality, {})
    assert opened(data).format == output_format.upper()
    assert np.array_equal(np.asarray(opened(data)), np.asarray(sample()))


@pytest.mark.parametrize(
    ("output_format", "least_db"),
    [
        ("jpeg", {10: 24, 60: 29, 89: 30, 90: 39, 95: 42, 100: 48}),
        ("webp", {10: 24, 60: 28, 90: 29, 95: 29, 99: 29}),
    ],
)
def test_a_higher_quality_is_nearer_to_the_picture_and_larger(
    output_format: OutputFormat, least_db: dict[int, int]
) -> None:
    files = [encode(sample(), output_format, quality, {}) for quality in least_db]
    assert {opened(data).format for data in files} == {output_format.upper()}
    figures = [psnr_db(data, sample()) for data in files]
    for figure, least in zip(figures, least_db.values(), strict=True):
        assert figure > least
    assert figures == sorted(figures)
    assert [len(data) for data in files] == sorted(len(data) for data in files)
    assert len(files[-1]) < len(encode(sample(), "png", 100, {}))


def sampling_of(jpeg: bytes) -> list[int]:
    """How often each component is there, from the frame header: 0x22 is twice in both ways."""
    frame = jpeg.index(b"\xff\xc0")
    return [jpeg[frame + 11 + 3 * component] for component in range(3)]


@pytest.mark.parametrize("quality", [1, 50, 89, 90, 95, 100])
def test_jpeg_keeps_the_colour_of_every_pixel_from_quality_90_on(quality: int) -> None:
    sampling = sampling_of(encode(sample(), "jpeg", quality, {}))
    assert sampling == ([0x11, 0x11, 0x11] if quality >= 90 else [0x22, 0x11, 0x11])


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (8, 4096), (333, 77)], ids=str)
def test_any_size_is_taken(output_format: OutputFormat, size: tuple[int, int]) -> None:
    assert opened(encode(Image.new("RGB", size, "red"), output_format, 95, {})).size == size


@pytest.mark.parametrize("output_format", FORMATS)
def test_without_metadata_there_is_none(output_format: OutputFormat) -> None:
    image = opened(encode(sample(), output_format, 95, {}))
    assert (
        not set(image.info)
        - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        - {
            "loop",
            "background",
            "timestamp",
            "duration",
        }
    )
    assert not image.getexif()
