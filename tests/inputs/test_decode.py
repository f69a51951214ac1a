"""An input picture: what its bytes are made into."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import decode as decode_module
from sdxl_worker.inputs.decode import decode, fit


def file(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(data: bytes, *, height: int | None = None, width: int | None = None) -> Image.Image:
    """As a job draws on it."""
    image = fit(decode(data, "image_url"), "image_url", height_px=height, width_px=width)
    assert image.mode == "RGB"
    return image


def refusal(data: bytes, **sides: int) -> str:
    with pytest.raises(RequestError) as caught:
        loaded(data, **sides)
    message = str(caught.value)
    assert message.startswith("image_url: ")
    return message


def noise(width: int = 128, height: int = 64, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "gif", "tiff"])
def test_the_usual_formats_are_decoded(kind: str) -> None:
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    assert loaded(file(picture, kind)).getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=2)


def test_a_lossless_picture_within_the_bounds_comes_through_as_it_is() -> None:
    assert loaded(file(noise())).tobytes() == noise().tobytes()


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (64, 128), "blue")
    upright.paste("red", (0, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    stored = upright.rotate(90, expand=True)
    picture = loaded(file(stored, "jpeg", exif=exif, quality=95))
    assert picture.size == (64, 128)
    assert picture.getpixel((32, 20)) == pytest.approx((254, 0, 0), abs=4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_flattened_on_white(mode: str) -> None:
    # What is transparent holds black, which a plain conversion to RGB would bring to light.
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 32, 64))
    result = loaded(file(picture.convert(mode) if mode != "RGBA" else picture))
    assert result.getpixel((50, 32)) == (255, 255, 255)
    assert result.getpixel((10, 32)) == (0, 0, 0)


def test_a_transparent_colour_of_a_palette_is_flattened_on_white() -> None:
    picture = Image.new("P", (64, 64), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    assert loaded(file(picture, transparency=1)).getpixel((3, 3)) == (255, 255, 255)


def test_half_transparency_is_blended() -> None:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert loaded(file(picture)).getpixel((9, 9)) == pytest.approx((127, 127, 127), abs=1)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((64, 64), 128 * 257, np.uint16))
    assert loaded(file(grey)).getpixel((0, 0)) == pytest.approx((128, 128, 128), abs=1)


def test_grey_and_cmyk_become_rgb() -> None:
    assert loaded(file(Image.new("L", (64, 64), 77))).getpixel((0, 0)) == (77, 77, 77)
    cmyk = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    assert loaded(file(cmyk, "jpeg")).getpixel((0, 0)) == pytest.approx((254, 0, 0), abs=6)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((128, 64), (128, 64)),
        ((2048, 2048), (2048, 2048)),
        ((101, 101), (104, 104)),  # to a multiple of 8
        ((1023, 767), (1024, 768)),
        ((4096, 2048), (2048, 1024)),  # down to the largest side
        ((3000, 2000), (2048, 1368)),
        ((32, 32), (64, 64)),  # up to the smallest side
        ((10, 200), (64, 1280)),
        ((64, 2048), (64, 2048)),
    ],
)
def test_without_sides_the_size_is_the_nearest_within_the_bounds(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture = fit(Image.new("RGB", size), "image_url", height_px=None, width_px=None)
    assert picture.size == expected
    assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_one_given_side_sets_the_other_by_the_aspect_ratio() -> None:
    wide = Image.new("RGB", (400, 200))
    assert fit(wide, "image_url", height_px=None, width_px=128).size == (128, 64)
    assert fit(wide, "image_url", height_px=128, width_px=None).size == (256, 128)


def test_both_given_sides_are_the_size() -> None:
    picture = loaded(file(noise(200, 100)), height=96, width=72)
    assert picture.size == (72, 96)


@pytest.mark.parametrize("size", [(64, 2176), (5000, 8), (1, 33)])
def test_an_aspect_ratio_without_a_size_in_the_bounds_is_refused(size: tuple[int, int]) -> None:
    message = refusal(file(Image.new("RGB", size)))
    assert f"{size[0]} x {size[1]} pixels" in message
    assert "give both height and width" in message


def test_one_given_side_may_push_the_other_over_the_bounds() -> None:
    assert "would become 64 x 4096" in refusal(file(Image.new("RGB", (8, 512))), width=64)


def test_a_truncated_picture_is_refused() -> None:
    whole = file(noise())
    assert "damaged" in refusal(whole[: len(whole) // 2])


@pytest.mark.parametrize("data", [b"", b"hello", b"<html>"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert "not a picture" in refusal(data)


def test_the_field_that_is_to_blame_is_named() -> None:
    with pytest.raises(RequestError, match=r"^init_image: not a picture"):
        decode(b"hello", "init_image")
    with pytest.raises(RequestError, match=r"^init_image: .* 64 x 2176 pixels would become"):
        fit(Image.new("RGB", (64, 2176)), "init_image", height_px=None, width_px=None)


def test_a_picture_with_too_many_pixels_is_refused_by_its_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_module, "MAX_INPUT_PIXELS", 128 * 64 - 1)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    assert "128 x 64 pixels is over the limit" in refusal(file(noise()))


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_a_header_that_claims_a_huge_picture_is_told_its_limit(side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    message = refusal(png)
    assert f"over the limit of {64 * 1024**2} pixels" in message
