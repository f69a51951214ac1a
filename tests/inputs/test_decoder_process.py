"""Decoding in a process of its own: what it costs is bounded, and the worker lives on."""

import asyncio
import functools
import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import decoder_process
from sdxl_worker.inputs.decoder_process import InputPicture, decode_apart, decode_mask_apart
from sdxl_worker.inputs.fitting import Fit
from sdxl_worker.inputs.masks import Mask
from tests.support import REPOSITORY

FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "avif")


def file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(width: int, height: int, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    fast = {"png": {"compress_level": 1}, "avif": {"speed": 10}, "webp": {"method": 0}}
    return file(Image.new(mode, (width, height)), kind, **fast.get(kind, {}), **options)


def decoded_of(data: bytes, **options: Any) -> InputPicture:
    sides = {"height_px": None, "width_px": None}
    return asyncio.run(decode_apart(data, "image_url", **(sides | options)))


def drawn_on(data: bytes, height: int | None = None, width: int | None = None) -> Image.Image:
    return decoded_of(data, height_px=height, width_px=width).picture


def mask_of(data: bytes, fit: Fit, **options: bool) -> Mask:
    return asyncio.run(decode_mask_apart(data, "mask_url", fit, **options))


def refusal(data: bytes) -> str:
    with pytest.raises(RequestError, match=r"^image_url: ") as caught:
        drawn_on(data)
    return str(caught.value)


def test_a_picture_comes_through_as_it_is() -> None:
    picture = Image.effect_noise((128, 64), 50).convert("RGB")
    assert drawn_on(file(picture, "png")).tobytes() == picture.tobytes()


def test_the_given_sides_hold() -> None:
    assert drawn_on(plain(200, 100, "png"), height=96, width=72).size == (72, 96)


@pytest.mark.parametrize(
    ("sent", "options", "expected"),
    [
        ((4096, 134), {}, (2048, 64)),
        ((4096, 134), {"masked": True}, (4096, 134)),
        ((4160, 130), {"masked": True}, (4096, 128)),
        ((20, 300), {"masked": True}, (20, 300)),
        ((256, 64), {"height_px": 1024}, (4096, 1024)),
        ((256, 64), {"height_px": 64, "masked": True}, (256, 64)),
        ((135, 64), {"height_px": 64, "masked": True}, (136, 64)),
        ((96, 64), {"height_px": 4096, "width_px": 64}, (64, 4096)),
    ],
)
def test_a_size_that_was_asked_for_may_be_larger_and_a_masked_picture_keeps_its_own(
    sent: tuple[int, int], options: dict[str, Any], expected: tuple[int, int]
) -> None:
    decoded = decoded_of(plain(*sent, "png"), **options)
    assert decoded.picture.size == decoded.fit.size == expected
    assert decoded.fit.sent_size == sent
    assert decoded.mask is None


def test_the_way_in_which_it_is_fitted_holds() -> None:
    picture = Image.effect_noise((200, 100), 50).convert("RGB")
    for how in ("crop", "pad", "stretch"):
        decoded = decoded_of(file(picture, "png"), height_px=64, width_px=64, how=how)
        assert decoded.fit == Fit((200, 100), (64, 64), how)
        assert decoded.picture == decoded.fit.of_picture(picture)


def test_a_mask_comes_with_its_picture_s_transparency() -> None:
    picture = Image.new("RGBA", (70, 65), (0, 0, 0, 255))
    picture.putpixel((69, 3), (0, 0, 0, 0))
    data = file(picture, "png")
    expected = np.zeros((65, 70), bool)
    expected[3, 69] = True
    decoded = decoded_of(data, masked=True, mask_from_alpha=True)
    assert decoded.mask is not None
    assert decoded.picture.getpixel((69, 3)) == (0, 0, 0), "its own colour"
    assert np.array_equal(decoded.mask, expected)
    inverted = decoded_of(data, masked=True, mask_from_alpha=True, mask_invert=True)
    assert inverted.mask is not None
    assert np.array_equal(inverted.mask, ~expected)
    assert inverted.picture.getpixel((69, 3)) == (255, 255, 255), "it stays, on white"


def test_a_mask_may_be_in_its_own_transparency_or_in_that_of_its_picture_if_there_is_any() -> None:
    hole = Image.new("LA", (70, 66), (255, 255))
    hole.paste((255, 0), (0, 0, 35, 66))
    data = file(hole, "png")
    left = np.repeat([[True] * 35 + [False] * 35], 66, axis=0)
    fit = Fit((70, 66), (70, 66), "crop")
    assert np.array_equal(mask_of(data, fit, from_alpha=True), left)
    assert np.array_equal(mask_of(data, fit, from_alpha=True, mask_invert=True), ~left)
    decoded = decoded_of(data, mask_from_alpha="if_any")
    assert decoded.mask is not None
    assert np.array_equal(decoded.mask, left)
    assert decoded.picture.size == (70, 66), "to the pixel, as with any mask"
    without = decoded_of(plain(70, 66, "png"), mask_from_alpha="if_any")
    assert without.mask is None
    assert without.picture.size == (64, 64)


def test_a_mask_is_fitted_as_its_picture_was() -> None:
    mask = Image.new("L", (400, 200))
    mask.paste(255, (0, 0, 200, 200))
    left = np.repeat([[True] * 32 + [False] * 32], 64, axis=0)
    fit = Fit((200, 100), (64, 64), "crop")
    assert np.array_equal(mask_of(file(mask, "png"), fit), left)
    assert np.array_equal(mask_of(file(mask, "png"), fit, mask_invert=True), ~left)


def test_a_mask_s_refusals_name_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Fit((64, 64), (64, 64), "crop")
    monkeypatch.setattr(decoder_process, "MAX_MEMORY_BYTES", 160 * 1024**2)
    for data, words in (
        (b"%PDF-1.7", "not a picture that can be read"),
        (plain(64, 64, "png"), "nothing in it is at least half white"),
        (plain(64, 128, "png"), "does not fit a picture of 64 x 64"),
        (plain(8193, 8192, "png", "L"), "over the limit of 67108864 pixels"),
        (plain(8192, 8192, "png", "L"), "of memory"),
    ):
        with pytest.raises(RequestError, match=f"^mask_url: .*{words}"):
            mask_of(data, fit)


def test_a_refusal_comes_through_as_it_is() -> None:
    assert refusal(b"%PDF-1.7").startswith("image_url: not a picture that can be read (PDF); send ")
    assert "would become 64 x 2176" in refusal(plain(64, 2176, "png"))


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 24 MB of pixels: too many for one limit, and not for the next."""
    data = plain(3000, 2000, kind)
    monkeypatch.setattr(decoder_process, "MAX_MEMORY_BYTES", 200 * 1024**2)
    assert drawn_on(data).size == (2048, 1368)
    monkeypatch.setattr(decoder_process, "MAX_MEMORY_BYTES", 64 * 1024**2)
    assert any(words in refusal(data) for words in ("MB of memory", "too large", "crashed"))


def test_memory_is_bounded_where_the_header_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """libavif decodes the video frame in whatever size it has, and then scales it down."""
    data = plain(6000, 6000, "avif")
    lie = data.replace(struct.pack(">II", 6000, 6000), struct.pack(">II", 64, 64))
    assert lie != data
    assert drawn_on(lie).size == (64, 64)
    monkeypatch.setattr(decoder_process, "MAX_MEMORY_BYTES", 96 * 1024**2)
    assert "too large to decode" in refusal(lie)


@pytest.mark.parametrize(
    ("kind", "size", "mode", "options"),
    [
        ("png", (8192, 8192), "RGB", {}),
        ("png", (8192, 8192), "LA", {}),
        ("jpeg", (8192, 8192), "RGB", {"progressive": True, "subsampling": 0}),
        ("gif", (8192, 8192), "P", {}),
        ("webp", (8192, 6144), "RGB", {}),
    ],
)
def test_the_largest_pictures_are_within_the_bound(
    kind: str, size: tuple[int, int], mode: str, options: dict[str, Any]
) -> None:
    assert max(drawn_on(plain(*size, kind, mode, **options)).size) == 2048


@pytest.mark.parametrize(
    ("kind", "size", "mode"),
    [
        ("png", (8192, 8192), "RGBA"),
        ("png", (8192, 8192), "LA"),
        ("webp", (8192, 6144), "RGBA"),
    ],
)
def test_the_largest_pictures_with_a_mask_of_their_own_are_within_the_bound(
    kind: str, size: tuple[int, int], mode: str
) -> None:
    data = plain(*size, kind, mode)
    decoded = decoded_of(data, masked=True, mask_from_alpha=True)
    assert decoded.mask is not None
    assert decoded.mask.all()
    assert decoded.mask.shape[::-1] == decoded.picture.size == (4096, 4096 * size[1] // size[0])


@pytest.mark.parametrize(
    ("kind", "size", "mode", "options"),
    [
        ("png", (8192, 8192), "L", {}),
        ("png", (8192, 8192), "RGBA", {}),
        ("jpeg", (8192, 8192), "CMYK", {"progressive": True}),
        ("webp", (8192, 6144), "RGB", {}),
    ],
)
def test_the_largest_masks_are_within_the_bound(
    kind: str, size: tuple[int, int], mode: str, options: dict[str, Any]
) -> None:
    fit = Fit(size, (4096, 4096 * size[1] // size[0]), "crop")
    white = kind == "jpeg"  # whose CMYK begins without ink
    assert mask_of(plain(*size, kind, mode, **options), fit, mask_invert=not white).all()


def test_more_pixels_than_that_are_refused_by_the_header() -> None:
    assert "over the limit of 50331648 pixels" in refusal(plain(8192, 6145, "webp"))
    assert "over the limit of 67108864 pixels" in refusal(plain(8193, 8192, "png", "L"))


def program(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put another program in the decoder's place."""
    (folder / "other_decoder.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(decoder_process, "_PROGRAM", "other_decoder")


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program("import time; time.sleep(60)", monkeypatch, tmp_path)
    monkeypatch.setattr(decoder_process, "DECODE_TIMEOUT_SECONDS", 0.1)
    assert "takes too long to decode" in refusal(plain(64, 64, "png"))


def test_the_time_of_the_cpu_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "from sdxl_worker.inputs import decode\ndef busy(*_):\n while True: pass\n"
    program(f"{text}decode.decode = busy\ndecode.main()", monkeypatch, tmp_path)
    monkeypatch.setattr(decoder_process, "DECODE_CPU_SECONDS", 1)
    began = time.monotonic()
    assert "takes too long to decode" in refusal(plain(64, 64, "png"))
    assert time.monotonic() - began < 30


def test_a_cancelled_job_ends_its_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    text = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program(text, monkeypatch, tmp_path)

    async def cancelled() -> int:
        decoding = asyncio.create_task(
            decode_apart(b"", "image_url", height_px=None, width_px=None)
        )
        while not (told.exists() and told.read_text()):
            await asyncio.sleep(0.01)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        return int(told.read_text())

    pid = asyncio.run(cancelled())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_decoder_is_given_no_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RUNPOD_AI_API_KEY", "secret")
    told = tmp_path / "environment"
    program(f"import os; open({str(told)!r}, 'w').write(str(os.environ))", monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="Expecting value"):
        drawn_on(b"")  # the program answers nothing
    assert "MALLOC_ARENA_MAX" in told.read_text()
    assert "RUNPOD" not in told.read_text()


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    """It is small, and takes minutes: each scan goes over all pixels."""
    data = plain(4096, 4096, "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    slow = data[:last] + data[last:-2] * 3000 + data[-2:]
    began = time.monotonic()
    assert "over 100 scans" in refusal(slow)
    assert time.monotonic() - began < 5
    assert drawn_on(data).size == (2048, 2048)


def test_its_limits_cannot_be_raised_from_inside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "limits"
    program(
        "import resource\nfrom sdxl_worker.inputs import decode\ndef look(*_):\n"
        " both = resource.RLIMIT_AS, resource.RLIMIT_CPU\n"
        " limits = [resource.getrlimit(one)[1] for one in both]\n"
        f" open({str(told)!r}, 'w').write(str(limits))\n raise MemoryError\n"
        "decode.decode = look\ndecode.main()",
        monkeypatch,
        tmp_path,
    )
    assert "of memory" in refusal(b"")
    expected = [decoder_process.MAX_MEMORY_BYTES, decoder_process.DECODE_CPU_SECONDS + 1]
    assert told.read_text() == str(expected)


def test_a_decoder_ends_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    (tmp_path / "other_decoder.py").write_text(
        "import os, time\nfrom sdxl_worker.inputs import decode\ndef slow(*_):\n"
        f" open({str(told)!r}, 'w').write(str(os.getpid()))\n time.sleep(60)\n"
        "decode.decode = slow\ndecode.main()"
    )
    script = (
        "import asyncio\nfrom sdxl_worker.inputs import decoder_process as one\n"
        "one._PROGRAM = 'other_decoder'\n"
        "asyncio.run(one.decode_apart(b'', 'image_url', height_px=None, width_px=None))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment
    ) as worker:
        while not (told.exists() and told.read_text()):
            time.sleep(0.02)
        worker.kill()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(int(told.read_text())):
        if psutil.Process(int(told.read_text())).status() == psutil.STATUS_ZOMBIE:
            break
        assert time.monotonic() < deadline, "the decoder is still there"
        time.sleep(0.02)


def test_a_decoder_that_cannot_run_is_not_the_caller_s_mistake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program("raise OSError('libjpeg.so: no such file')", monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match=r"cannot run: (.|\n)*libjpeg\.so"):
        drawn_on(plain(64, 64, "png"))


def test_a_crash_of_the_decoder_is_the_picture_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program("import os; os.abort()", monkeypatch, tmp_path)
    assert "crashed its decoder" in refusal(plain(64, 64, "png"))


def test_one_picture_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program(
        f"import time\nlog = open({str(log)!r}, 'a', 1)\n"
        "log.write('start\\n'); time.sleep(0.1); log.write('end\\n')",
        monkeypatch,
        tmp_path,
    )

    async def three() -> None:
        one = functools.partial(decode_apart, b"", "image_url", height_px=None, width_px=None)
        await asyncio.gather(*(one() for _ in range(3)), return_exceptions=True)

    for _ in range(2):  # a second event loop has a lock of its own
        asyncio.run(three())
    assert log.read_text().split() == ["start", "end"] * 6
