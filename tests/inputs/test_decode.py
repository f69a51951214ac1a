"""An input picture: what its bytes are made into."""

import functools
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import decode as decode_module
from sdxl_worker.inputs.decode import decode, decode_mask, decode_with_alpha, mask_of, picture_of
from sdxl_worker.inputs.fitting import choose_fit

BOUNDS_PX = (64, 2048, 8)


def file(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(data: bytes) -> Image.Image:
    """As a job draws on it."""
    image = decode(data, "image_url")
    fit = choose_fit(
        image.size, "image_url", height_px=None, width_px=None, how="crop", bounds_px=BOUNDS_PX
    )
    image = fit.of_picture(image)
    assert image.mode == "RGB"
    return image


def refusal(data: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        loaded(data)
    message = str(caught.value)
    assert message.startswith("image_url: ")
    return message


def noise(width: int = 128, height: int = 64, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "avif", "mpo"])
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


def test_a_truncated_picture_is_refused() -> None:
    whole = file(noise())
    assert "damaged" in refusal(whole[: len(whole) // 2])


@pytest.mark.parametrize("data", [b"", b"hello", b"\n{}", bytes(2000)])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert "not a picture" in refusal(data)


def test_the_field_that_is_to_blame_is_named() -> None:
    with pytest.raises(RequestError, match=r"^init_image: not a picture"):
        decode(b"hello", "init_image")
    with pytest.raises(RequestError, match=r"^init_image: .* 64 x 2176 pixels would become"):
        choose_fit(
            (64, 2176),
            "init_image",
            height_px=None,
            width_px=None,
            how="crop",
            bounds_px=BOUNDS_PX,
        )


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


@pytest.mark.parametrize(
    ("kind", "name"),
    [("tiff", "TIFF"), ("jpeg2000", "JPEG 2000"), ("eps", "EPS"), ("ico", "ICO"), ("icns", "ICNS"),
     ("ppm", "PNM"), ("dds", "DDS"), ("pdf", "PDF")],
)  # fmt: skip
def test_another_format_is_refused_by_its_name(kind: str, name: str) -> None:
    message = refusal(file(noise(64, 64), kind))
    assert message == (
        f"image_url: not a picture that can be read ({name}); "
        "send PNG, JPEG, WebP, GIF, BMP or AVIF"
    )


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"8BPS\0\1" + bytes(90), "PSD"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(90), "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isom" + bytes(90), "MP4"),
        (b"\xff\x0a" + bytes(90), "JPEG XL"),
        (b"SIMPLE  =                    T" + bytes(90), "FITS"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="a">', "SVG"),
        (b"\n<!DOCTYPE html><title>404</title>", "HTML"),
        (b"<html>", "HTML"),
    ],
)
def test_a_file_that_is_often_sent_in_error_is_named(data: bytes, name: str) -> None:
    assert f"not a picture that can be read ({name}); send PNG" in refusal(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int) -> None:
    upright = Image.new("RGB", (128, 64), "blue")
    upright.paste("red", (0, 0, 32, 32))
    steps = Image.Transpose
    stored = {
        1: [], 2: [steps.FLIP_LEFT_RIGHT], 3: [steps.ROTATE_180], 4: [steps.FLIP_TOP_BOTTOM],
        5: [steps.TRANSPOSE], 6: [steps.ROTATE_90], 7: [steps.TRANSVERSE], 8: [steps.ROTATE_270],
    }[orientation]  # fmt: skip
    picture = upright
    for step in stored:
        picture = picture.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert loaded(file(picture, "png", exif=exif)).tobytes() == upright.tobytes()


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nonsense"])
def test_broken_exif_does_not_spoil_a_picture(exif: bytes) -> None:
    assert loaded(file(noise(), "png", exif=exif)).tobytes() == noise().tobytes()


def test_the_first_frame_of_an_animation_is_drawn_on() -> None:
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    for kind in ("png", "gif", "webp", "avif"):
        data = file(first, kind, save_all=True, append_images=[second])
        assert loaded(data).getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=3), kind


def test_a_transparent_grey_of_sixteen_bits_is_flattened_on_white() -> None:
    values = np.full((64, 64), 300 * 100, np.uint16)
    values[:32] = 1234
    result = loaded(file(Image.fromarray(values), transparency=1234))
    assert result.getpixel((9, 9)) == (255, 255, 255)
    assert result.getpixel((9, 50)) == pytest.approx((117, 117, 117), abs=1)


def test_bands_leave_no_trace() -> None:
    """As many rows as several bands have, and some."""
    picture = noise(2048, 1040, 4)
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    assert decode(file(picture, compress_level=1), "image_url").tobytes() == whole.tobytes()


def test_a_png_with_a_large_text_is_decoded_and_with_a_huge_one_refused() -> None:
    def with_text(megabytes: int) -> bytes:
        text = PngImagePlugin.PngInfo()
        text.add_text("workflow", "x" * megabytes * 1024**2, zip=True)
        return file(noise(), pnginfo=text)

    assert loaded(with_text(4)).tobytes() == noise().tobytes()
    assert "damaged" in refusal(with_text(64))


def profile(
    space: bytes,
    *,
    gamma: float = 2.2,
    levels: Sequence[int] = (),
    # Of Display P3, adapted to the D50 white of profiles (SMPTE EG 432-1).
    red: tuple[float, float, float] = (0.5151, 0.2412, -0.0011),
    green: tuple[float, float, float] = (0.2920, 0.6922, 0.0419),
    blue: tuple[float, float, float] = (0.1571, 0.0666, 0.7841),
) -> bytes:
    """An ICC profile, version 2 (ICC.1:2001-04)."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    if levels:
        curve = b"curv\0\0\0\0" + struct.pack(f">I{len(levels)}H", len(levels), *levels)
    if space == b"CMYK":
        # Two points for each ink: all are white but for full yellow, which is made red (Lab).
        table = b"".join(
            bytes([136, 208, 195]) if i & 2 else bytes([255, 128, 128]) for i in range(16)
        )
        ramp = bytes(range(256))
        tags = {
            b"A2B0": b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])
            + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
            + ramp * 4 + table + ramp * 3
        }  # fmt: skip
    elif space == b"GRAY":
        tags = {b"kTRC": curve}
    else:
        tags = {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags[b"wtpt"] = xyz((0.9642, 1.0, 0.8249))
    index, body = b"", b""
    for name, tag in tags.items():
        index += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(tag))
        body += tag
    body = struct.pack(">I", len(tags)) + index + body
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"\0" * 4, 0x02400000,
                       b"prtr" if space == b"CMYK" else b"mntr", space.ljust(4),
                       b"Lab " if space == b"CMYK" else b"XYZ ")  # fmt: skip
    head = head.ljust(36, b"\0") + b"acsp"
    return head.ljust(68, b"\0") + xyz((0.9642, 1.0, 0.8249))[8:] + bytes(48) + body


P3 = profile(b"RGB")
# A green that a screen of sRGB shows as well: (0.4, 0.6, 0.3) in Display P3.
P3_GREEN, SRGB_GREEN = (102, 153, 77), (83, 154, 67)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "avif"])
def test_a_colour_profile_is_converted_from(kind: str) -> None:
    options = {"quality": 98} if kind != "png" else {}
    data = file(Image.new("RGB", (64, 64), P3_GREEN), kind, icc_profile=P3, **options)
    assert loaded(data).getpixel((9, 9)) == pytest.approx(SRGB_GREEN, abs=5)


def test_a_colour_profile_holds_for_transparent_pictures_and_for_palettes() -> None:
    half = Image.new("RGBA", (64, 64), (*P3_GREEN, 128))
    expected = [(value + 255) / 2 for value in SRGB_GREEN]
    assert loaded(file(half, icc_profile=P3)).getpixel((9, 9)) == pytest.approx(expected, abs=4)
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette(P3_GREEN)
    result = loaded(file(palette, icc_profile=P3)).getpixel((9, 9))
    assert result == pytest.approx(SRGB_GREEN, abs=4)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_holds_for_greys(mode: str) -> None:
    """Half of the range in a gamma of 1 is half of the light."""
    greys: dict[str, int | tuple[int, int]] = {"L": 128, "LA": (128, 255), "I;16": 128 * 257}
    data = file(Image.new(mode, (64, 64), greys[mode]), icc_profile=profile(b"GRAY", gamma=1))
    assert loaded(data).getpixel((9, 9)) == pytest.approx((188, 188, 188), abs=2)


def test_a_cmyk_profile_holds_for_cmyk() -> None:
    """In which yellow ink is red, so that a plain conversion shows."""
    yellow = Image.new("CMYK", (64, 64), (0, 0, 255, 0))
    data = file(yellow, "jpeg", icc_profile=profile(b"CMYK"), quality=98)
    red, green, blue = loaded(data).getpixel((9, 9))  # type: ignore[misc]
    assert red > 200 > 100 > max(green, blue)
    plain = loaded(file(yellow, "jpeg", quality=98)).getpixel((9, 9))
    assert plain == pytest.approx((255, 255, 0), abs=6)


def test_a_profile_of_srgb_leaves_every_byte() -> None:
    """By whatever name and in whatever form: lcms's own, and a small one whose curve is a table."""
    shares = [i / 25 for i in range(26)]
    levels = [
        round(65535 * (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)) for x in shares
    ]
    table = profile(
        b"RGB",
        levels=levels,
        red=(0.4361, 0.2225, 0.0139),
        green=(0.3851, 0.7169, 0.0971),
        blue=(0.1431, 0.0606, 0.7141),
    )
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for srgb in (own, table):
        assert loaded(file(noise(), icc_profile=srgb)).tobytes() == noise().tobytes()


@pytest.mark.parametrize(
    "broken",
    [b"nonsense", P3[:100], P3[:200], b"\0" * 500, profile(b"GRAY"), profile(b"CMYK"),
     profile(b"CMYK")[:500]],
)  # fmt: skip
def test_a_profile_that_says_nothing_of_the_picture_is_left_aside(broken: bytes) -> None:
    assert loaded(file(noise(), icc_profile=broken)).tobytes() == noise().tobytes()


def test_a_profile_of_two_megabytes_is_read() -> None:
    large = P3 + np.random.default_rng(0).bytes(2 * 1024**2)
    data = file(Image.new("RGB", (64, 64), P3_GREEN), icc_profile=large)
    assert loaded(data).getpixel((9, 9)) == pytest.approx(SRGB_GREEN, abs=4)


def test_a_webp_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_WEBP_PIXELS", 128 * 64 - 1)
    assert "a WEBP picture of 128 x 64 pixels is over the limit" in refusal(file(noise(), "webp"))


FUZZED = {
    "png": {"icc_profile": P3},
    "jpeg": {"progressive": True, "icc_profile": P3},
    "webp": {"exif": b"Exif\0\0II*\0\1\0"},
    "gif": {},
    "bmp": {},
    "avif": {"speed": 10, "icc_profile": P3},
}


@pytest.mark.parametrize("kind", FUZZED)
def test_whatever_a_decoder_makes_of_broken_bytes_is_the_caller_s_error(kind: str) -> None:
    random = np.random.default_rng(0)
    whole = file(noise(64, 64), kind, **FUZZED[kind])  # type: ignore[arg-type]
    refusals = set()
    refused = 0
    for i in range(150):
        data = bytearray(whole)
        if i % 3 == 0:
            del data[int(random.integers(len(data))) :]
        else:
            # Half of them in the headers, which most decoders hardly check.
            for at in random.integers(min(len(data), (200, len(data))[i % 2]), size=1 + i % 5):
                data[at] = random.integers(256)
        try:
            decode(bytes(data), "image_url")
        except RequestError as error:
            refused += 1
            refusals.add(str(error))
    assert refused >= 20
    for message in refusals:
        assert message.startswith("image_url: ")
        assert len(message) < 150
        assert "object at" not in message


def refused(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def white_in(data: bytes) -> list[list[bool]]:
    mask = decode_mask(data, "mask_url")
    assert mask.mode == "L"
    values = np.asarray(mask)
    assert set(np.unique(values)) <= {0, 255}
    return (values == 255).tolist()


def row(mode: str, *values: Any) -> Image.Image:
    picture = Image.new(mode, (len(values), 1))
    for i, value in enumerate(values):
        picture.putpixel((i, 0), value)
    return picture


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (row("L", 127, 128, 0, 255), "png"),
        (row("I;16", 127 * 257, 128 * 257, 1, 65535), "png"),
        (row("1", 0, 255, 0, 255), "png"),
        (row("P", 1, 2, 0, 3), "gif"),
        (row("RGB", (254, 0, 0), (128, 128, 128), (0, 0, 255), (0, 255, 0)), "png"),
        (row("LA", (127, 255), (128, 255), (255, 0), (255, 128)), "png"),
        (row("RGBA", (255,) * 3 + (127,), (255,) * 3 + (128,), (255,) * 3 + (0,), (255,) * 4),
         "webp"),
    ],
)  # fmt: skip
def test_a_mask_is_white_from_half_on_where_it_is_opaque(picture: Image.Image, kind: str) -> None:
    if picture.mode == "P":
        picture.putpalette([0, 0, 0, 127, 127, 127, 128, 128, 128, 255, 255, 255])
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    assert white_in(file(picture, kind, **options)) == [[False, True, False, True]]


def test_a_transparent_colour_of_a_mask_is_black() -> None:
    palette = row("P", 0, 1)
    palette.putpalette([255] * 6)
    assert white_in(file(palette, transparency=0)) == [[False, True]]
    assert white_in(file(row("I;16", 65535, 65534), transparency=65535)) == [[False, True]]


def test_a_mask_in_cmyk_is_read() -> None:
    white = Image.new("CMYK", (16, 8), (0, 0, 0, 0))
    white.paste((0, 0, 0, 255), (0, 0, 8, 8))
    assert white_in(file(white, "jpeg", quality=98)) == [[False] * 8 + [True] * 8] * 8


def test_a_mask_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert white_in(file(row("L", 255, 0, 0), exif=exif)) == [[True], [False], [False]]


def test_a_colour_profile_says_nothing_of_a_mask() -> None:
    grey = file(row("L", 127, 128), icc_profile=profile(b"GRAY", gamma=1))
    assert white_in(grey) == [[False, True]]


def test_a_mask_has_the_same_bounds_and_messages_under_its_own_name() -> None:
    large = file(Image.new("1", (8193, 8192)))
    for data in (b"%PDF-1.7", file(noise())[:200], large):
        message = refused(decode_mask, data, "mask_url")
        assert message == refused(decode, data, "mask_url")
        assert message.startswith("mask_url: ")


@pytest.mark.parametrize("size", [(0, 0), (0, 8), (2**31 - 1, 0), (2**31 - 1, 2**31 - 1)])
def test_a_mask_that_lies_about_its_size_is_refused(size: tuple[int, int]) -> None:
    whole = file(noise(64, 64).convert("L"))
    header = b"IHDR" + struct.pack(">II", *size) + whole[24:29]
    data = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    assert refused(decode_mask, data, "mask_url").startswith("mask_url: ")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_from_half_on_is_a_mask(mode: str) -> None:
    alpha = row("L", 0, 127, 128, 255)
    picture = Image.new("RGBA", alpha.size, (10, 10, 10, 255))
    picture.putalpha(alpha)
    if mode == "P":
        picture = row("P", 0, 1, 2, 3)
        picture.putpalette([10] * 12)
    options: dict[str, Any] = {"transparency": alpha.tobytes()} if mode == "P" else {}
    data = file(picture.convert(mode) if mode == "LA" else picture, **options)
    decoded, mask = decode_with_alpha(data, "image_url", on_white=True)
    assert list(mask.tobytes()) == [255, 255, 0, 0]
    assert decoded.tobytes() == decode(data, "image_url").tobytes(), "and it lies on white"


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif"])
def test_a_picture_without_transparency_gives_no_mask(kind: str) -> None:
    message = refused(
        functools.partial(decode_with_alpha, on_white=True),
        file(Image.new("RGB", (64, 64)), kind),
        "image_url",
    )
    assert message == (
        "mask_from_alpha: the picture has no transparency; send one that has, or mask_url"
    )


def fitted_mask(data: bytes, **options: Any) -> np.ndarray:
    given: dict[str, Any] = {
        "sent_size": (128, 64),
        "size": (128, 64),
        "how": "crop",
        "mask_invert": False,
    }
    given |= options
    answer, pixels = mask_of(data, "mask_url", **given)
    assert answer == {}
    return np.frombuffer(pixels, bool).reshape(given["size"][::-1])


def half_white(width: int = 128, height: int = 64) -> Image.Image:
    picture = Image.new("L", (width, height))
    picture.paste(255, (0, 0, width // 2, height))
    return picture


def test_a_mask_can_be_inverted() -> None:
    data = file(half_white())
    assert fitted_mask(data)[:, :64].all()
    assert (fitted_mask(data) != fitted_mask(data, mask_invert=True)).all()


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_a_mask_is_inverted_before_it_is_fitted(how: str) -> None:
    """So that a pixel which is white in part is repainted either way."""
    picture = Image.new("L", (128, 64), 255)
    picture.putpixel((64, 32), 0)
    inverted = fitted_mask(file(picture), size=(64, 64), how=how, mask_invert=True)
    assert 0 < inverted.sum() <= 4


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((128, 64), True),
        ((1280, 640), True),
        ((1280, 646), True),  # within one in a hundred
        ((1280, 660), False),
        ((32, 16), True),
        ((32, 17), True),  # within one pixel
        ((32, 18), False),
        ((64, 128), False),
    ],
)
def test_a_mask_has_the_shape_of_its_picture(size: tuple[int, int], fits: bool) -> None:
    data = file(half_white(*size))
    if fits:
        assert fitted_mask(data)[:, :60].all()
    else:
        assert refused(fitted_mask, data) == (
            f"mask_url: a mask of {size[0]} x {size[1]} pixels does not fit a picture of 128 x 64; "
            "send one of the same shape"
            + " (a photograph may be turned by its EXIF orientation)"
            * (size[0] <= size[1])
        )


@pytest.mark.parametrize(("invert", "empty"), [(False, 0), (True, 255)])
def test_an_empty_mask_is_refused_by_name(invert: bool, empty: int) -> None:
    message = refused(fitted_mask, file(Image.new("L", (128, 64), empty)), mask_invert=invert)
    assert message.startswith(
        f"mask_url: nothing in it is {'black' if invert else 'at least half white'}, so "
    )
    assert "nothing would be repainted" in message
    assert "mask_invert" in message
    assert fitted_mask(file(Image.new("L", (128, 64), 255 - empty)), mask_invert=invert).all()


def test_a_mask_of_what_is_cropped_away_is_refused() -> None:
    edge = Image.new("L", (128, 64))
    edge.paste(255, (0, 0, 8, 64))
    data = file(edge)
    assert "set fit to pad or stretch" in refused(fitted_mask, data, size=(64, 64))
    assert fitted_mask(data, size=(64, 64), how="pad").any()


def from_alpha(data: bytes, **options: Any) -> tuple[dict[str, Any], bytes, bytes]:
    given: dict[str, Any] = {"height_px": None, "width_px": None, "how": "crop"}
    given |= {"bounds_px": (64, 4096, 1)}
    given |= {"mask_from_alpha": True, "mask_invert": False}
    return picture_of(data, "image_url", **given | options)


def test_a_mask_from_transparency_is_fitted_with_its_picture() -> None:
    picture = Image.new("RGBA", (200, 100), (0, 0, 255, 255))
    picture.paste((255, 0, 0, 0), (0, 0, 100, 100))
    answer, pixels, mask = from_alpha(file(picture), height_px=64, width_px=64)
    assert answer == {"sent_size": (200, 100), "size": (64, 64), "how": "crop"}
    assert np.frombuffer(mask, bool).reshape(64, 64)[5].tolist() == [True] * 32 + [False] * 32
    colours = np.frombuffer(pixels, np.uint8).reshape(64, 64, 3)
    assert (colours[:, 32:] == (0, 0, 255)).all(), "nothing of the hole's red"


@pytest.mark.parametrize(("invert", "alpha"), [(False, 255), (True, 0)])
def test_transparency_that_makes_an_empty_mask_is_refused(invert: bool, alpha: int) -> None:
    data = file(Image.new("RGBA", (64, 64), (0, 0, 0, alpha)))
    message = refused(from_alpha, data, mask_invert=invert)
    what = "opaque" if invert else "half transparent"
    assert message.startswith(f"mask_from_alpha: nothing in the picture is {what}, so ")
    assert "mask_invert" in message
    assert from_alpha(data, mask_invert=not invert)[2] == b"\1" * 64 * 64


def test_the_soft_edge_of_a_hole_keeps_its_colours() -> None:
    """On white, it would be a light ring around whatever is drawn into the hole."""
    picture = Image.new("RGBA", (64, 8), (35, 70, 215, 255))
    for x in range(64):
        for y in range(8):
            picture.putpixel((x, y), (35, 70, 215, 4 * x))
    data = file(picture)
    kept, mask = decode_with_alpha(data, "image_url", on_white=False)
    assert kept.getcolors() == [(64 * 8, (35, 70, 215))]
    assert mask.getpixel((31, 0)) == 255
    assert mask.getpixel((32, 0)) == 0
    on_white, same = decode_with_alpha(data, "image_url", on_white=True)
    assert on_white.getpixel((40, 0)) != (35, 70, 215)
    assert same.tobytes() == mask.tobytes()


def with_alpha(*levels: int) -> Image.Image:
    """A grey picture of one row, of which each pixel has another opacity."""
    picture = row("L", *[90] * len(levels)).convert("RGBA")
    picture.putalpha(row("L", *levels))
    return picture


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_mask_s_transparency_may_be_what_counts(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    mask = decode_mask(
        file(with_alpha(0, 127, 128, 255), kind, **options), "mask_url", from_alpha=True
    )
    assert list(mask.tobytes()) == [255, 255, 0, 0], "as OpenAI has it: whatever the colour"
    palette = row("P", 0, 1)
    palette.putpalette([255] * 6)
    mask = decode_mask(file(palette, transparency=0), "mask_url", from_alpha=True)
    assert list(mask.tobytes()) == [255, 0]


def test_a_mask_without_transparency_or_without_a_hole_is_refused_with_what_helps() -> None:
    for picture, invert, words in (
        (half_white(), False, "the picture has no transparency; erase in it what is to change"),
        (half_white().convert("RGBA"), False, "nothing in it is half transparent, so nothing"),
        (Image.new("LA", (128, 64)), True, "nothing in it is opaque, so with mask_invert nothing"),
    ):
        data = file(picture)
        message = refused(fitted_mask, data, from_alpha=True, mask_invert=invert)
        assert message.startswith(f"mask_url: {words}")
        assert invert or "if that is white, set mask_from_alpha to false" in message


def test_a_mask_of_transparency_is_fitted_and_inverted_as_any() -> None:
    mask = Image.new("LA", (256, 128), (255, 255))
    mask.paste((255, 0), (0, 0, 128, 128))
    fitted = fitted_mask(file(mask), from_alpha=True)
    assert fitted[:, :64].all()
    assert not fitted[:, 64:].any()
    assert (fitted_mask(file(mask), from_alpha=True, mask_invert=True) == ~fitted).all()


@pytest.mark.parametrize(
    "picture",
    [
        noise(64, 64),
        noise(64, 64).convert("RGBA"),
        Image.new("RGBA", (64, 64), (0, 0, 255, 128)),
    ],
)
def test_a_picture_that_is_opaque_needs_no_mask_where_that_is_left_to_it(
    picture: Image.Image,
) -> None:
    data = file(picture)
    assert from_alpha(data, mask_from_alpha="if_any") == from_alpha(data, mask_from_alpha=False)
    assert from_alpha(data, mask_from_alpha="if_any")[2] == b""


def test_a_picture_with_a_hole_is_masked_by_it_where_that_is_left_to_it() -> None:
    picture = noise(70, 66).convert("RGBA")
    picture.putpixel((69, 3), (0, 0, 0, 0))
    data = file(picture)
    bounds: dict[str, Any] = {"bounds_px": (64, 2048, 8), "masked_bounds_px": (1, 4096, 1)}
    left_to_it = from_alpha(data, mask_from_alpha="if_any", **bounds)
    assert left_to_it == from_alpha(data, **bounds)
    assert left_to_it[0]["size"] == (70, 66), "to the pixel, as with any mask"
    assert np.flatnonzero(np.frombuffer(left_to_it[2], bool)).tolist() == [3 * 70 + 69]
    without = from_alpha(file(noise(70, 66)), mask_from_alpha="if_any", **bounds)
    assert without[0]["size"] == (64, 64)


def test_a_picture_s_mistakes_are_told_as_ever_where_its_mask_is_left_to_it() -> None:
    for data in (b"%PDF-1.7", file(noise())[:200]):
        message = refused(from_alpha, data, mask_from_alpha="if_any")
        assert message == refused(decode, data, "image_url")
