"""Bytes become a picture to draw on: plain RGB, upright, in a size that the models take."""

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from sdxl_worker.errors import RequestError
from sdxl_worker.request import MAX_SIDE_PX, MIN_SIDE_PX, SIDE_MULTIPLE_PX

# Decoded, a picture takes 3 or 4 bytes a pixel. A larger one is refused once its header is read.
MAX_INPUT_PIXELS = 64 * 1024**2


def decode(data: bytes, field: str) -> Image.Image:
    """The picture as RGB, turned as its EXIF orientation says, transparency on white.

    Args:
        field: the place of `data` in the request, for messages.

    Raises:
        RequestError: it is not a picture that can be decoded, or is too large.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_INPUT_PIXELS:
            raise RequestError(
                f"{field}: a picture of {picture.width} x {picture.height} pixels is over "
                f"the limit of {MAX_INPUT_PIXELS} pixels"
            )
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        elif picture.mode.startswith("I;16"):
            # Pillow would clip 16 bits to 8; a depth map or a scan needs them scaled.
            picture = picture.point(lambda value: value / 257).convert("L")
        return picture.convert("RGB")
    except UnidentifiedImageError:
        raise RequestError(
            f"{field}: not a picture that can be read (PNG, JPEG, WebP and the like can)"
        ) from None
    except Image.DecompressionBombError:
        # Pillow's own limit, also by the header, is larger and checked first.
        raise RequestError(
            f"{field}: the picture is over the limit of {MAX_INPUT_PIXELS} pixels"
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{field}: the picture is damaged ({error})") from None


def fit(
    picture: Image.Image, field: str, *, height_px: int | None, width_px: int | None
) -> Image.Image:
    """Resize to the given sides; a side that is not given follows from the aspect ratio.

    With neither given, the picture keeps its size as far as the bounds of `height` and `width`
    and their multiple allow.

    Args:
        field: the place of `picture` in the request, for messages.

    Raises:
        RequestError: no size with this aspect ratio is within the bounds.
    """
    lowest, highest, multiple = MIN_SIDE_PX, MAX_SIDE_PX, SIDE_MULTIPLE_PX
    if width_px and height_px:
        size = (width_px, height_px)
    else:
        if width_px:
            scale = width_px / picture.width
        elif height_px:
            scale = height_px / picture.height
        else:
            scale = min(1.0, highest / max(picture.size))
            scale = max(scale, lowest / min(picture.size))
        width, height = (round(side * scale / multiple) * multiple for side in picture.size)
        size = (width_px or width, height_px or height)
    if min(size) < lowest or max(size) > highest:
        raise RequestError(
            f"{field}: a picture of {picture.width} x {picture.height} pixels would become "
            f"{size[0]} x {size[1]}, and each side must be from {lowest} to {highest}; "
            "give both height and width, or crop the picture"
        )
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
