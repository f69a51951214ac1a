"""The input picture: fetched or decoded, made plain RGB, and fitted to a size the models take."""

import base64
import binascii
import io

from PIL import Image, ImageOps, UnidentifiedImageError

from sdxl_worker.errors import RequestError
from sdxl_worker.request import Request, field_schemas

MAX_DOWNLOAD_BYTES = 50 * 1024**2
FETCH_TIMEOUT_SECONDS = 20
# Decoded, a picture takes 3 or 4 bytes a pixel. A larger one is refused by its header.
MAX_INPUT_PIXELS = 64 * 1024**2


def load_image(request: Request) -> Image.Image | None:
    """The request's input picture, upright, on white, RGB, in the size to refine; or None.

    Raises:
        RequestError: it cannot be fetched or decoded, or has no size within the bounds.
    """
    if request.image_url is None:
        return None
    if request.image_url[:5].lower() == "data:":
        data = _decoded_data_uri(request.image_url)
    else:
        data = _fetched(request.image_url)
    return fitted(_decoded_picture(data), height_px=request.height, width_px=request.width)


def fitted(picture: Image.Image, *, height_px: int | None, width_px: int | None) -> Image.Image:
    """Resize to the given sides; a side that is not given follows from the aspect ratio.

    With neither given, the picture keeps its size as far as the bounds of `height` and `width`
    and their multiple allow.

    Raises:
        RequestError: the aspect ratio has no size within the bounds.
    """
    bounds = field_schemas()["height"]
    lowest, highest, multiple = bounds["minimum"], bounds["maximum"], bounds["multipleOf"]

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
            f"image_url: a picture of {picture.width} x {picture.height} pixels would become "
            f"{size[0]} x {size[1]}, and each side must be from {lowest} to {highest}; "
            "give both height and width, or crop the picture"
        )
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _decoded_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not (header.lower().endswith(";base64") and comma):
        raise RequestError(
            "image_url: a data URI must read data:image/png;base64, (or another picture type) "
            "and then the picture in base64"
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("image_url: what follows base64, is not valid base64") from None


def _fetched(url: str) -> bytes:
    # The SDK's fetcher connects to public addresses only, whatever the name resolves to and
    # wherever a redirect leads. It is imported here because runpod takes a second or two.
    import requests
    from runpod.serverless.utils import rp_ssrf

    try:
        with rp_ssrf.safe_get(
            url, timeout=FETCH_TIMEOUT_SECONDS, max_bytes=MAX_DOWNLOAD_BYTES
        ) as response:
            if response.status_code != requests.codes.ok:
                raise RequestError(
                    f"image_url: its server answered {response.status_code} {response.reason}"
                )
            chunks = rp_ssrf.iter_content_capped(response, 1024**2, MAX_DOWNLOAD_BYTES)
            return b"".join(chunks)
    except rp_ssrf.SSRFError as error:
        raise RequestError(f"image_url: the worker does not fetch this: {error}") from None
    except requests.Timeout:
        raise RequestError(
            f"image_url: its server did not answer within {FETCH_TIMEOUT_SECONDS} seconds"
        ) from None
    except (requests.RequestException, ValueError, OSError) as error:
        raise RequestError(
            f"image_url: could not be fetched ({type(error).__name__}); is the address right?"
        ) from None


def _decoded_picture(data: bytes) -> Image.Image:
    """RGB, turned as its EXIF orientation says, transparency on white."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_INPUT_PIXELS:
            raise RequestError(
                f"image_url: a picture of {picture.width} x {picture.height} pixels is over "
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
            "image_url: not a picture that can be read (PNG, JPEG, WebP and the like can)"
        ) from None
    except Image.DecompressionBombError:
        # Pillow's own limit, by the header too, is larger and asked first.
        raise RequestError(
            f"image_url: the picture is over the limit of {MAX_INPUT_PIXELS} pixels"
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"image_url: the picture is damaged ({error})") from None
