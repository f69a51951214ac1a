"""The input picture: where it may come from, and what it is made into."""

import base64
import http.server
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.decode import fitted, load_image
from sdxl_worker.request import parse_request
from tests.support import data_uri


def loaded(image_url: str, **job_input: Any) -> Image.Image:
    image = load_image(parse_request({"image_url": image_url, **job_input}))
    assert image is not None
    assert image.mode == "RGB"
    return image


def refusal(image_url: str, **job_input: Any) -> str:
    with pytest.raises(RequestError) as caught:
        loaded(image_url, **job_input)
    message = str(caught.value)
    assert message.startswith("image_url: ")
    return message


def noise(width: int = 128, height: int = 64, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels)


def test_without_image_url_there_is_no_picture() -> None:
    assert load_image(parse_request({"prompt": "a"})) is None


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "gif", "tiff"])
def test_a_data_uri_is_decoded(kind: str) -> None:
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    assert loaded(data_uri(picture, kind)).getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=2)


def test_a_lossless_picture_within_the_bounds_comes_through_as_it_is() -> None:
    assert loaded(data_uri(noise())).tobytes() == noise().tobytes()


def test_a_data_uri_may_be_in_capitals_and_broken_into_lines() -> None:
    header, payload = data_uri(noise()).split(",")
    lines = "\r\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    assert loaded(f"{header.upper()},{lines}").tobytes() == noise().tobytes()


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (64, 128), "blue")
    upright.paste("red", (0, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    stored = upright.rotate(90, expand=True)
    picture = loaded(data_uri(stored, "jpeg", exif=exif, quality=95))
    assert picture.size == (64, 128)
    assert picture.getpixel((32, 20)) == pytest.approx((254, 0, 0), abs=4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_flattened_on_white(mode: str) -> None:
    # What is transparent holds black, which a plain conversion to RGB would bring to light.
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 32, 64))
    result = loaded(data_uri(picture.convert(mode) if mode != "RGBA" else picture))
    assert result.getpixel((50, 32)) == (255, 255, 255)
    assert result.getpixel((10, 32)) == (0, 0, 0)


def test_a_transparent_colour_of_a_palette_is_flattened_on_white() -> None:
    picture = Image.new("P", (64, 64), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    assert loaded(data_uri(picture, transparency=1)).getpixel((3, 3)) == (255, 255, 255)


def test_half_transparency_is_blended() -> None:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert loaded(data_uri(picture)).getpixel((9, 9)) == pytest.approx((127, 127, 127), abs=1)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((64, 64), 128 * 257, np.uint16))
    assert loaded(data_uri(grey)).getpixel((0, 0)) == pytest.approx((128, 128, 128), abs=1)


def test_grey_and_cmyk_become_rgb() -> None:
    assert loaded(data_uri(Image.new("L", (64, 64), 77))).getpixel((0, 0)) == (77, 77, 77)
    cmyk = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    assert loaded(data_uri(cmyk, "jpeg")).getpixel((0, 0)) == pytest.approx((254, 0, 0), abs=6)


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
    picture = fitted(Image.new("RGB", size), height_px=None, width_px=None)
    assert picture.size == expected
    assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_one_given_side_sets_the_other_by_the_aspect_ratio() -> None:
    wide = Image.new("RGB", (400, 200))
    assert fitted(wide, height_px=None, width_px=128).size == (128, 64)
    assert fitted(wide, height_px=128, width_px=None).size == (256, 128)


def test_both_given_sides_are_the_size() -> None:
    picture = loaded(data_uri(noise(200, 100)), height=96, width=72)
    assert picture.size == (72, 96)


@pytest.mark.parametrize("size", [(64, 2176), (5000, 8), (1, 33)])
def test_an_aspect_ratio_without_a_size_in_the_bounds_is_refused(size: tuple[int, int]) -> None:
    message = refusal(data_uri(Image.new("RGB", size)))
    assert f"{size[0]} x {size[1]} pixels" in message
    assert "give both height and width" in message


def test_one_given_side_may_push_the_other_over_the_bounds() -> None:
    assert "would become 64 x 4096" in refusal(data_uri(Image.new("RGB", (8, 512))), width=64)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png,abc", "must read data:image/png;base64,"),
        ("data:image/png;base64", "must read data:image/png;base64,"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,\u00e4\u00e4\u00e4\u00e4", "not valid base64"),
        ("data:image/png;base64,", "not a picture"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
    ],
)
def test_a_wrong_data_uri_is_answered_with_the_reason(uri: str, reason: str) -> None:
    assert reason in refusal(uri)


def test_a_truncated_picture_is_refused() -> None:
    buffer = io.BytesIO()
    noise().save(buffer, "png")
    half = base64.b64encode(buffer.getvalue()[: len(buffer.getvalue()) // 2]).decode()
    assert "damaged" in refusal("data:image/png;base64," + half)


def test_a_picture_with_too_many_pixels_is_refused_by_its_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs, "MAX_INPUT_PIXELS", 128 * 64 - 1)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    assert "128 x 64 pixels is over the limit" in refusal(data_uri(noise()))


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_a_header_that_claims_a_huge_picture_is_told_its_limit(side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    message = refusal("data:image/png;base64," + base64.b64encode(png).decode())
    assert f"over the limit of {64 * 1024**2} pixels" in message


class PictureServer(http.server.BaseHTTPRequestHandler):
    """`/a.png` is a picture; the other paths are what can go wrong."""

    queries: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.queries.append(query)
        buffer = io.BytesIO()
        noise().save(buffer, "png")
        body, status = buffer.getvalue(), 200
        if path == "/missing.png":
            body, status = b"no", 404
        elif path == "/page.html":
            body = b"<html>"
        elif path == "/moved.png":
            status = 302
        self.send_response(status)
        self.send_header("Location", "/a.png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def private_addresses_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")


@pytest.mark.usefixtures("private_addresses_allowed")
class TestFetching:
    def test_an_address_is_fetched(self, server: str) -> None:
        assert loaded(f"{server}/a.png?key=1").tobytes() == noise().tobytes()
        assert PictureServer.queries[-1] == "key=1"

    def test_a_redirect_is_followed(self, server: str) -> None:
        assert loaded(f"{server}/moved.png").tobytes() == noise().tobytes()

    def test_what_the_server_answers_is_told(self, server: str) -> None:
        assert "answered 404 Not Found" in refusal(f"{server}/missing.png")

    def test_a_page_is_no_picture(self, server: str) -> None:
        assert "not a picture" in refusal(f"{server}/page.html")

    def test_a_download_has_a_limit(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inputs, "MAX_DOWNLOAD_BYTES", 1000)
        assert "size cap" in refusal(f"{server}/a.png")

    def test_a_dead_server_is_told(self, server: str) -> None:
        port = int(server.rpartition(":")[2])
        with pytest.raises(RequestError, match=r"could not be fetched \(ConnectionError\)"):
            loaded(f"http://127.0.0.1:{port % 60000 + 1024}/a.png")

    def test_a_port_that_is_no_number_is_told(self) -> None:
        assert "could not be fetched" in refusal("http://127.0.0.1:http/a.png")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0.0.0.0", "2130706433"],
)
def test_private_addresses_are_not_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("connected"))
    assert "does not fetch this" in refusal(f"http://{host}/a.png")


def test_a_redirect_to_a_private_address_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    from runpod.serverless.utils import rp_ssrf

    def redirect(_: Any, url: str, **__: Any) -> tuple[Any, Any]:
        assert "198.51" not in url or url.startswith("http://8.8.8.8"), url
        response = type("Response", (), {})()
        response.status_code, response.headers = 302, {"Location": "http://127.0.0.1/a.png"}
        response.close = lambda: None
        return type("Session", (), {"close": lambda _: None})(), response

    monkeypatch.setattr(rp_ssrf, "_get_via_first_reachable_ip", redirect)
    assert "non-public address 127.0.0.1" in refusal("http://8.8.8.8/a.png")
