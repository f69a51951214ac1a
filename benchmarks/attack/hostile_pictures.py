"""Pictures that nobody would send by mistake: bombs, cut files, odd modes, other formats."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from benchmarks.attack.job_inputs import png_bytes

# 400 million pixels: more than any worker should decode.
BOMB_SIDE_PX = 20_000
LARGEST_SIDE_PX = 8_000
FRAMES = 1000
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class HostilePicture:
    name: str
    data: bytes
    expected: Image.Image | None = None
    """What has to come of it, where a refusal would be wrong."""
    is_taken: bool | None = None
    """Whether it has to be taken, or else refused, as a mask of `sample()`. None: either."""


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(width: int = 96, height: int = 64) -> Image.Image:
    """Four colours, by which each of the eight orientations can be told."""
    small = Image.new("RGB", (2, 2))
    small.putdata([(200, 40, 40), (40, 200, 40), (40, 40, 200), (220, 220, 60)])
    return small.resize((width, height), Image.Resampling.NEAREST)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes, *chunks: bytes, depth: int = 8) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = (
        _png_chunk(b"IHDR", head),
        *chunks,
        _png_chunk(b"IDAT", data),
        _png_chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _zeros(count: int) -> bytes:
    """Zeros, compressed two hundredfold."""
    packer = zlib.compressobj(1)
    block = bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(count // 2**20 + 1)) + packer.flush()


def _text_bomb() -> bytes:
    text = _png_chunk(b"zTXt", b"Comment\x00\x00" + _zeros(300 * 2**20))
    data = png_bytes(sample())
    return data[:33] + text + data[33:]  # after the header


def bombs() -> Iterator[HostilePicture]:
    side = BOMB_SIDE_PX
    yield HostilePicture("PNG bomb", _png(side, side, _zeros(3 * side * 400)))
    largest = Image.new("L", (LARGEST_SIDE_PX, LARGEST_SIDE_PX))
    yield HostilePicture("PNG just under the limit", png_bytes(largest, compress_level=1))
    yield HostilePicture(
        "PNG with alpha, just under the limit",
        png_bytes(Image.new("RGBA", largest.size, (1, 2, 3, 4)), compress_level=1),
    )
    yield HostilePicture("PNG of 2^31 - 1 a side", _png(2**31 - 1, 2**31 - 1, _zeros(100)))
    yield HostilePicture("PNG of 1 x 64 million", _png(1, 64_000_000, _zeros(4 * 64_000_000)))
    yield HostilePicture("PNG with more data than pixels", _png(8, 8, _zeros(500 * 2**20)))
    yield HostilePicture("PNG with a text bomb", _text_bomb())
    icc = _png_chunk(b"iCCP", b"p\x00\x00" + _zeros(300 * 2**20))
    yield HostilePicture("PNG with a profile bomb", _png(8, 8, zlib.compress(bytes(25 * 8)), icc))
    many = _png_chunk(b"tEXt", b"a\x00b") * 200_000
    yield HostilePicture("PNG of 200,000 chunks", _png(8, 8, zlib.compress(bytes(25 * 8)), many))
    yield HostilePicture("JPEG bomb", _jpeg_of_size(65_500, 65_500))
    yield HostilePicture("GIF bomb", _gif_of_size(65_535, 65_535))
    yield HostilePicture("BMP bomb", _bmp_of_size(60_000, 60_000))
    yield HostilePicture("WebP bomb", _webp_of_size(16_383, 16_383))
    frames = [Image.new("RGB", (32, 32), (i % 251, i % 7, i % 3)) for i in range(FRAMES)]
    for kind in ("gif", "png", "webp", "tiff"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        yield HostilePicture(f"{kind.upper()} of {FRAMES} frames", data)


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(sample(), "jpeg"))
    at = data.index(b"\xff\xc0") + 5  # the frame's height and width
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _gif_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(sample().convert("P"), "gif"))
    size = struct.pack("<HH", width, height)
    data[6:10] = size
    at = data.index(b"\x2c") + 5  # the frame's own size
    data[at : at + 4] = size
    return bytes(data)


def _bmp_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(sample(), "bmp"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def _webp_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(sample(), "webp", lossless=True))
    at = data.index(b"VP8L") + 9  # 14 bits of width - 1, 14 of height - 1, 4 that stay
    rest = struct.unpack_from("<I", data, at)[0] >> 28
    struct.pack_into("<I", data, at, (width - 1) | (height - 1) << 14 | rest << 28)
    return bytes(data)


def cut_files() -> Iterator[HostilePicture]:
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        data = encoded(sample(), kind)
        for share in (0.02, 0.3, 0.7, 0.98):
            cut = data[: int(len(data) * share)]
            yield HostilePicture(f"{kind.upper()} cut at {share:.0%}", cut)
        noise = bytearray(data)
        for at in range(60, len(noise), 37):
            noise[at] ^= 0x55
        yield HostilePicture(f"{kind.upper()} with wrong bytes", bytes(noise))


def orientations() -> Iterator[HostilePicture]:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        for kind, options in (("jpeg", {"quality": 95}), ("png", {}), ("webp", {"lossless": True})):
            data = encoded(sample(), kind, exif=exif, **options)
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            yield HostilePicture(f"{kind.upper()} with orientation {orientation}", data, upright)
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        data = encoded(sample(), "png", exif=exif)
        yield HostilePicture(f"PNG with orientation {orientation}", data, sample())
    junk = encoded(sample(), "png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + bytes(99))
    yield HostilePicture("PNG with junk EXIF", junk, sample())


def odd_modes() -> Iterator[HostilePicture]:
    rgb = sample()
    grey = rgb.convert("L")
    grey_rgb = grey.convert("RGB")
    clear = Image.new("RGBA", rgb.size, (9, 9, 9, 0))
    white = Image.new("RGB", rgb.size, "white")
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    yield HostilePicture("grey PNG", png_bytes(grey), grey_rgb)
    yield HostilePicture("grey PNG of 16 bits", png_bytes(sixteen), grey_rgb)
    yield HostilePicture("transparent PNG", png_bytes(clear), white)
    yield HostilePicture("transparent grey PNG", png_bytes(clear.convert("LA")), white)
    black_or_white = grey.convert("1")
    yield HostilePicture("PNG of 1 bit", png_bytes(black_or_white), black_or_white.convert("RGB"))
    yield HostilePicture("CMYK JPEG", encoded(rgb.convert("CMYK"), "jpeg", quality=95), rgb)
    yield HostilePicture("palette PNG", png_bytes(rgb.quantize(4)), rgb)
    yield HostilePicture("TIFF of floats", encoded(Image.new("F", (64, 64), 0.5), "tiff"))
    yield HostilePicture(
        "TIFF of floats that are no numbers",
        encoded(Image.fromarray(np.full((64, 64), np.nan, np.float32)), "tiff"),
    )
    yield HostilePicture(
        "TIFF of 32-bit integers", encoded(Image.new("I", (64, 64), 2**30), "tiff")
    )
    yield HostilePicture("CMYK TIFF", encoded(rgb.convert("CMYK"), "tiff"))
    yield HostilePicture("LAB TIFF", encoded(Image.new("LAB", (64, 64)), "tiff"))
    yield HostilePicture("PNG of one pixel", png_bytes(Image.new("RGB", (1, 1))))
    yield HostilePicture("PNG of 3000 x 1", png_bytes(Image.new("RGB", (3000, 1))))


def other_formats() -> Iterator[HostilePicture]:
    rgb = sample(64, 64)
    for kind in (
        "tiff",
        "jpeg2000",
        "icns",
        "ico",
        "eps",
        "pcx",
        "ppm",
        "sgi",
        "tga",
        "dds",
        "bmp",
    ):
        try:
            yield HostilePicture(kind.upper(), encoded(rgb, kind))
        except (OSError, KeyError):
            continue  # this Pillow cannot write it
    layers = b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3)
    yield HostilePicture("PSD", layers + bytes(64))
    cards = ("SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =  2")
    sizes = ("NAXIS1  =                30000", "NAXIS2  =                30000", "END")
    fits = "".join(card.ljust(80) for card in (*cards, *sizes)).ljust(2880).encode()
    yield HostilePicture("FITS", fits)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
    yield HostilePicture("EPS with a program", postscript + b"(/etc/passwd) (r) file pop {} loop\n")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield HostilePicture("SVG", svg)
    yield HostilePicture("HTML", b"<!DOCTYPE html><html></html>")
    yield HostilePicture("ZIP", b"PK\x03\x04" + bytes(100))
    yield HostilePicture("nothing", b"")
    yield HostilePicture("zeros", bytes(5000))
    yield HostilePicture("noise", np.random.default_rng(0).bytes(5000))
    wmf = b"\xd7\xcd\xc6\x9a" + bytes(2) + struct.pack("<hhhhH", 0, 0, 30000, 30000, 1) + bytes(60)
    yield HostilePicture("WMF", wmf)


def odd_masks() -> Iterator[HostilePicture]:
    """Of `sample()`."""
    black = Image.new("L", sample().size)
    dot, clear = black.copy(), Image.new("RGBA", black.size, (255, 255, 255, 0))
    dot.putpixel((48, 32), 255)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8))
    for name, mask, is_taken in (
        ("an empty mask", black, False),
        ("a transparent mask", clear, False),
        ("a grey mask", Image.new("L", black.size, 127), False),
        ("a full mask", Image.new("L", black.size, 255), True),
        ("a mask of one pixel", dot, True),
        ("a mask of noise", noise, True),
        ("a mask of ten times the size", noise.resize((960, 640)), True),
        ("a mask of a tenth of the size", noise.resize((9, 6)), True),
        ("a mask turned by 90 degrees", noise.transpose(Image.Transpose.ROTATE_90), False),
        ("a square mask", noise.resize((64, 64)), False),
    ):
        yield HostilePicture(name, png_bytes(mask), is_taken=is_taken)


def all_pictures() -> Iterator[HostilePicture]:
    yield from small_pictures()
    yield from bombs()


def small_pictures() -> Iterator[HostilePicture]:
    """All but the bombs."""
    yield from orientations()
    yield from odd_modes()
    yield from cut_files()
    yield from other_formats()
