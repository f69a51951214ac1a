"""Our own encoder: what Pillow reads from it is what went in."""

import io
import json
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_worker.outputs.png import encode_png, encode_smallest_png
from tests.outputs.samples import smooth


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize(
    "pixels",
    [
        smooth(1024, 1024),
        np.random.default_rng(1).integers(0, 256, (64, 200, 3), np.uint8),
        np.zeros((1, 1, 3), np.uint8),
        np.full((2048, 64, 3), 255, np.uint8),
        smooth(128, 72)[:, ::2],  # not contiguous
    ],
    ids=["smooth", "noise", "one pixel", "even", "strided"],
)
def test_png_is_lossless(pixels: np.ndarray) -> None:
    image = opened(encode_png(pixels, {}))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(image), pixels)


def test_its_chunks_are_those_of_the_format_with_right_checksums() -> None:
    """Read without a library: some decoders do not check what stricter ones refuse."""
    data = encode_png(smooth(16, 24), {"a": "b", "c": "\u00e9", "d": "a\0b"})
    position, kinds = 8, []
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        assert checksum == zlib.crc32(kind + body)
        kinds.append(kind)
        if kind == b"IDAT":
            assert len(zlib.decompress(body)) == 16 * (1 + 3 * 24)
        position += 12 + length
    assert kinds == [b"IHDR", b"tEXt", b"iTXt", b"iTXt", b"IDAT", b"IEND"]


def test_text_of_any_characters_is_kept() -> None:
    value = "".join(map(chr, [0x20AC, 0x1F600, 0x0A, 0x7F, 0x00, 0x41]))
    text = {
        "request": json.dumps({"prompt": value}, ensure_ascii=False),
        "model": "m",
        "nul": "a\0b",
    }
    picture = smooth(8, 8)
    for png in (encode_png(picture, text), encode_smallest_png(Image.fromarray(picture), text)):
        chunks: dict[str, Any] = opened(png).text  # type: ignore[attr-defined]
        assert {name: str(chunk) for name, chunk in chunks.items()} == text
    assert json.loads(chunks["request"])["prompt"] == value


def test_the_smallest_one_is_the_same_picture_in_less_room() -> None:
    pixels = smooth(512, 512)
    smallest = encode_smallest_png(Image.fromarray(pixels), {"a": "b"})
    assert len(smallest) < 0.95 * len(encode_png(pixels, {"a": "b"}))
    assert np.array_equal(np.asarray(opened(smallest)), pixels)


def test_it_takes_a_third_of_the_time_of_pillow_s_fastest_level_for_files_hardly_larger() -> None:
    pixels = smooth(1024, 1024)
    image = Image.fromarray(pixels)

    def ours() -> int:
        return len(encode_png(pixels, {}))

    def pillow() -> int:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.tell()

    seconds: dict[Any, float] = {}
    for _ in range(3):
        for encode in (ours, pillow):
            started = time.perf_counter()
            encode()
            seconds[encode] = min(seconds.get(encode, 99), time.perf_counter() - started)
    assert seconds[ours] < seconds[pillow] / 3
    assert ours() < 1.15 * pillow()
