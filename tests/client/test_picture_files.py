"""client/picture_files.py: names, whole files, and metadata that leave the picture as it is."""

import dataclasses
import io
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client import picture_files
from client.picture_files import PictureError
from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs.answer import encode_pictures
from sdxl_worker.outputs.metadata import describe
from sdxl_worker.request import parse_request
from sdxl_worker.settings import MetadataLevel
from tests.outputs.samples import ABOUT, sample
from tests.outputs.test_metadata import FORMATS, HOSTILE, told

FIELDS = {"prompt": "a cat", "negative_prompt": HOSTILE, "seed": 7}
KINDS = [("png", 95), ("jpeg", 95), ("jpeg", 80), ("webp", 95), ("webp", 100)]


def made(output_format: OutputFormat, level: MetadataLevel = "no_prompts", **fields: Any) -> bytes:
    """A file of the worker's."""
    request = parse_request({**FIELDS, **fields})
    about = dataclasses.replace(ABOUT, metadata=level)
    [data] = encode_pictures([sample(64)], request, output_format=output_format, about=about)
    return data


def pixels(data: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(data))).tobytes()


def picture_data(data: bytes) -> bytes:
    """The bytes that the picture itself is made of."""
    if data[:2] == b"\xff\xd8":
        return data[data.index(b"\xff\xda") :]
    if data[:4] == b"RIFF":
        start = next(i for kind in (b"VP8 ", b"VP8L") if (i := data.find(kind)) > 0)
        [length] = struct.unpack_from("<I", data, start + 4)
        return data[start : start + 8 + length]
    return (
        b"".join(data[i - 4 : i + 8] for i in range(4, len(data)) if data[i : i + 4] == b"IDAT")
        + data[data.index(b"IDAT") : data.index(b"IEND")]
    )


@pytest.mark.parametrize(("output_format", "quality"), KINDS)
def test_a_completed_file_tells_what_the_worker_s_own_would(
    output_format: OutputFormat, quality: int
) -> None:
    data = made(output_format, output_quality=quality)
    whole = picture_files.completed(data, FIELDS, 7)
    assert picture_data(whole) == picture_data(data)
    assert pixels(whole) == pixels(data)
    request = parse_request({**FIELDS, "output_quality": quality})
    expected = describe(request, 0, (64, 64), ABOUT)
    for found in (told(whole), picture_files.read(whole)):
        found.setdefault("Software", expected["Software"])
        assert json.loads(found.pop("request")) == json.loads(expected["request"])
        assert found == {name: text for name, text in expected.items() if name != "request"}


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_file_that_has_its_prompts_stays_as_it_is(output_format: OutputFormat) -> None:
    data = made(output_format, "all")
    assert picture_files.completed(data, FIELDS, 7) is data


@pytest.mark.parametrize(("output_format", "quality"), KINDS)
def test_a_file_without_metadata_tells_the_request_without_secrets(
    output_format: OutputFormat, quality: int
) -> None:
    job_input = {
        **FIELDS,
        "num_images": 4,
        "image_url": "https://me:word@example.com/a.png?signature=s",
        "mask_url": "data:image/png;base64,AAAA",
        "upload_urls": ["https://example.com/put?signature=s"],
    }
    data = made(output_format, "none", output_quality=quality)
    whole = picture_files.completed(data, job_input, 9)
    assert picture_data(whole) == picture_data(data)
    assert pixels(whole) == pixels(data)
    assert picture_files.request_in(picture_files.read(whole)) == {
        **FIELDS,
        "seed": 9,
        "num_images": 1,
        "image_url": "https://example.com/a.png",
        "mask_url": "data:image/png;base64",
    }
    for secret in (b"word@", b"signature", b"AAAA"):
        assert secret not in whole.replace(picture_data(whole), b"")


def test_transparency_stays(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (1, 2, 3, 4)).save(tmp_path / "a.webp", lossless=True)
    data = (tmp_path / "a.webp").read_bytes()
    assert pixels(picture_files.completed(data, FIELDS, 1)) == pixels(data)


def test_prompts_that_do_not_fit_into_a_jpeg_are_left_out() -> None:
    data = made("jpeg")
    assert picture_files.completed(data, {"prompt": "x" * 40_000}, 7) is data


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("output_format", "quality"), KINDS)
def test_a_damaged_file_is_refused_or_stays_as_it_is(
    output_format: OutputFormat, quality: int
) -> None:
    data = made(output_format, output_quality=quality)
    for cut in range(0, len(data), 97):
        for damaged in (data[:cut], data[:cut] + b"\xff" * 8 + data[cut + 8 :]):
            try:
                found = picture_files.completed(damaged, FIELDS, 7)
            except PictureError:
                continue
            if found is not damaged:
                request = picture_files.request_in(picture_files.read(found))
                assert request is not None
                assert request["prompt"] == FIELDS["prompt"]


@pytest.mark.parametrize("encoding", ["no-such-one", "base64", "shift_jis"])
def test_a_foreign_file_s_metadata_may_be_in_any_encoding(encoding: str) -> None:
    xmp = f'<?xml version="1.0" encoding="{encoding}"?><a/>'.encode()
    for kind in ("WEBP", "JPEG"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind, xmp=xmp)
        assert picture_files.read(file.getvalue()) == {}
        whole = picture_files.completed(file.getvalue(), FIELDS, 7)
        request = picture_files.request_in(picture_files.read(whole))
        assert request == {**FIELDS, "num_images": 1}


@pytest.mark.parametrize("content", [b"", b"text", b"GIF89a" + b"\0" * 50, b"<svg/>"])
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(PictureError):
        picture_files.suffix_of(content)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A red Circle, on blue!", "a-red-circle-on-blue"),
        ("../../etc/passwd", "etc-passwd"),
        ("caf\u00e9 \u732b", "caf\u00e9-\u732b"),
        ("\x1b[2J\n", "2j"),
        ("?!", "picture"),
        ("x" * 300, "x" * 80),
        ("\u732b" * 300, "\u732b" * 26),
    ],
)
def test_names_are_readable_and_safe(text: str, name: str) -> None:
    assert picture_files.slug(text) == name


def _write(folder: str) -> str:
    return picture_files.write_new(b"content", Path(folder, "a.png")).name


def test_many_writers_get_a_name_each(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"mine")
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(_write, [str(tmp_path)] * 20))
    assert sorted(names) == sorted(f"a-{i}.png" for i in range(2, 22))
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"mine", b"content"}
    assert len(list(tmp_path.iterdir())) == 21


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        picture_files.write_new(b"content", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
