"""Pictures become files: PNG, JPEG or WebP, with the metadata in them."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs.exif import exif, xmp
from sdxl_worker.outputs.png import encode_png, encode_smallest_png

MEDIA_TYPES: Mapping[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
# From this quality on, JPEG keeps the colour of every pixel; below, that of every four.
FULL_COLOUR_QUALITY = 90
LOSSLESS_WEBP_QUALITY = 100
# Of 0 to 6. Up to 3, files of a photograph get no smaller, and 4 and more take two to eight times
# as long; without loss, 1 is 7 % smaller than 0, and the others are no smaller than 1.
WEBP_METHOD = 1


def encode(
    picture: Image.Image,
    output_format: OutputFormat,
    quality: int,
    text: Mapping[str, str],
    *,
    smallest: bool = False,
) -> bytes:
    """A picture as a file.

    Args:
        picture: RGB.
        quality: 1 to 100, of JPEG and WebP; WebP of 100 is lossless. PNG always is.
        text: what `describe` gives, or nothing. For JPEG, it must fit (`fits_jpeg`).
        smallest: spend some fifty times as long on a PNG that is about a tenth smaller.
    """
    if output_format == "png":
        if smallest:
            return encode_smallest_png(picture, text)
        return encode_png(np.asarray(picture), text)
    metadata = {"exif": exif(text), "xmp": xmp(text)} if text else {}
    file = io.BytesIO()
    if output_format == "jpeg":
        # Huffman tables of its own (`optimize`) would make it 2 % smaller in three times the time.
        sampling = "4:4:4" if quality >= FULL_COLOUR_QUALITY else "4:2:0"
        picture.save(file, "JPEG", quality=quality, subsampling=sampling, **metadata)
    elif quality == LOSSLESS_WEBP_QUALITY:
        # Here quality is the effort: more of it takes twice as long for the same size.
        picture.save(file, "WEBP", lossless=True, quality=0, method=WEBP_METHOD, **metadata)
    else:
        picture.save(file, "WEBP", quality=quality, method=WEBP_METHOD, **metadata)
    return file.getvalue()
