"""Lossless PNG, in a twentieth of the time of Pillow's default, a ninth of that of its level 1.

Pillow tries five filters on each row and deflates with zlib. Here each row is the difference to the
row above (filter type 2), and deflate is ISA-L's: the size is the same within a few percent.
The format: https://www.w3.org/TR/png-3/
"""

import io
import struct
from collections.abc import Mapping

import numpy as np
from isal import isal_zlib
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UP_FILTER = 2
DEFLATE_LEVEL = 1  # of 0 to 3
AFTER_HEADER = len(SIGNATURE) + 12 + 13


def encode_png(pixels: np.ndarray, text: Mapping[str, str]) -> bytes:
    """A PNG with one text chunk for each item of `text`.

    Args:
        pixels: RGB, uint8, [height, width, 3].
        text: keywords of 1 to 79 Latin-1 characters, and their values.
    """
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = UP_FILTER
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the filter wants it

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    return b"".join(
        [
            SIGNATURE,
            _chunk(b"IHDR", header),
            *(_text_chunk(*item) for item in text.items()),
            _chunk(b"IDAT", isal_zlib.compress(filtered, DEFLATE_LEVEL)),
            _chunk(b"IEND", b""),
        ]
    )


def encode_smallest_png(picture: Image.Image, text: Mapping[str, str]) -> bytes:
    """The same by Pillow, which chooses a filter for each row and has zlib do its best."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    png = file.getvalue()
    return (
        png[:AFTER_HEADER]
        + b"".join(_text_chunk(*item) for item in text.items())
        + png[AFTER_HEADER:]
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)])


def _text_chunk(keyword: str, value: str) -> bytes:
    """As tEXt, which every reader knows, or as iTXt (UTF-8) where there is more than ASCII in it.

    Neither is compressed, or has a language or a translated keyword.
    """
    if value.isascii() and "\0" not in value:
        return _chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + value.encode("ascii"))
    return _chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + value.encode("utf-8"))
