"""Bytes become a picture to draw on, plain RGB and upright, or a mask.

As a program, it makes one picture or mask of a stranger's bytes, in the size that is drawn;
`decoder_process` runs it so, within limits of memory and time. It imports little, because it starts
anew for each picture.
"""

import contextlib
import ctypes
import io
import itertools
import json
import math
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from PIL import (
    AvifImagePlugin,
    ExifTags,
    Image,
    ImageChops,
    ImageCms,
    PngImagePlugin,
    WebPImagePlugin,
)

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.fitting import Fit, FromAlpha, How, choose_fit

# A multi-picture file of a phone's camera (MPO) is opened as the JPEG that it begins with.
FORMATS = ("PNG", "JPEG", WebPImagePlugin.WebPImageFile.format, "GIF", "BMP", "AVIF")
WHAT_TO_SEND = "send PNG, JPEG, WebP, GIF, BMP or AVIF"

MAX_INPUT_PIXELS = 64 * 1024**2
# libwebp holds two more canvases: at 16 bytes a pixel, this is what the limit of memory leaves it.
MAX_WEBP_PIXELS = 48 * 1024**2

# Of a picture that is scaled with a hole in it, which takes two more copies.
MAX_PIXELS_WITH_HOLE = 24 * 1024**2

# A progressive JPEG has some ten, and takes as much time for each: one of 630 kB can take minutes.
MAX_JPEG_SCANS = 100
_JPEG_SCAN = b"\xff\xda"

# What a file begins with. Those that are decoded are here to be called damaged by their names.
_SIGNATURES = (
    ("PNG", rb"\x89PNG"),
    ("JPEG", rb"\xff\xd8\xff"),
    ("WebP", rb"RIFF.{4}WEBP"),
    ("GIF", rb"GIF8"),
    ("AVIF", rb".{4}ftyp.{0,48}avi[fs]"),
    ("HEIC", rb".{4}ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)"),
    ("JPEG 2000", rb".{4}jP  |\xff\x4f\xff\x51"),
    ("JPEG XL", rb".{4}JXL |\xff\x0a"),
    ("TIFF", rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]"),
    ("PSD", rb"8BPS"),
    ("OpenEXR", rb"v/1\x01"),
    ("Radiance HDR", rb"#\?RADIANCE"),
    ("DDS", rb"DDS "),
    ("FITS", rb"SIMPLE  ="),
    ("ICNS", rb"icns"),
    ("ICO", rb"\0\0[\x01\x02]\0"),
    ("PNM", rb"P[1-7fF]\s"),
    ("EPS", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("PDF", rb"%PDF"),
    ("MP4", rb".{4}ftyp"),
    ("WebM", rb"\x1a\x45\xdf\xa3"),
    ("ZIP", rb"PK\x03\x04"),
    ("SVG", rb"(\xef\xbb\xbf)?\s*(<[?!].*)?<svg[\s>]"),
    ("HTML", rb"(\xef\xbb\xbf)?\s*(?i:<(!doctype html|html|head|body))"),
    ("XML", rb"(\xef\xbb\xbf)?\s*<\?xml"),
    ("BMP", rb"BM"),
)
_DECODED = {"PNG", "JPEG", "WebP", "GIF", "BMP", "AVIF"}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A file's claim of more pixels is Pillow's DecompressionBombError, which comes at twice this number
# and before libwebp takes memory.
Image.MAX_IMAGE_PIXELS = MAX_INPUT_PIXELS // 2
# A CMYK profile is 2 MB, and generators write their workflow into the text of a PNG.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 1024**2
# Each of libavif's threads takes memory of its own.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_SET_SIGNAL_AT_PARENTS_END = 1  # PR_SET_PDEATHSIG

# Colours are converted in bands of rows, so that no second picture lies in memory on the way.
_BAND_PIXELS = 1024**2

# The most that rounding changes of 255.
_UNSEEN = 2

# From here on, what is white is white and what is opaque is opaque.
HALF = 128

ToSrgb = Callable[[Image.Image], Image.Image]


def decode(data: bytes, field: str) -> Image.Image:
    """The picture as sRGB, turned as its EXIF orientation says, transparency on white; of an
    animation, the first frame.

    A colour profile is converted from, relative to the white point; one that cannot be read, or
    is of other colours than the picture, is left aside as browsers do.

    Args:
        field: the place of `data` in the request, for messages.

    Raises:
        RequestError: it is not a picture that can be decoded, or is too large.
        MemoryError: if the decoder says so. For some formats it calls the picture damaged.
    """
    with _refusing(data, field):
        return _in_srgb(_opened(data, field))


def decode_with_alpha(
    data: bytes, field: str, *, on_white: bool
) -> tuple[Image.Image, Image.Image]:
    """What `decode` makes of the picture, and a mask: white where the picture is transparent by
    half and more, otherwise black.

    Args:
        on_white: as `decode` does it. Otherwise each pixel has the colour that the file gives it,
            however opaque: the soft edge of a hole would be a light one on white.

    Raises:
        RequestError: as `decode`; or the picture has no transparency.
        MemoryError: as `decode`.
    """
    with _refusing(data, field):
        # A copy is without the decoder, whose memory the mask and the result need.
        picture = _opened(data, field).copy()
        if not picture.has_transparency_data:
            raise RequestError(
                "mask_from_alpha: the picture has no transparency; send one that has, or mask_url"
            )
        return _in_srgb(picture, on_white=on_white), _holes(picture)


def decode_with_any_alpha(data: bytes, field: str) -> tuple[Image.Image, Image.Image | None]:
    """What `decode_with_alpha` makes of the picture, not on white. Where nothing in it is
    transparent by half, what `decode` makes of it, and no mask: many pictures are saved with a
    channel of opacity that says nothing.

    Raises:
        RequestError: as `decode`.
        MemoryError: as `decode`.
    """
    with _refusing(data, field):
        picture = _opened(data, field)
        if picture.has_transparency_data:
            picture = picture.copy()  # see `decode_with_alpha`
            holes = _holes(picture)
            if holes.getbbox() is not None:
                return _in_srgb(picture, on_white=False), holes
        return _in_srgb(picture), None


def _holes(picture: Image.Image) -> Image.Image:
    """White where the picture is transparent by half and more, otherwise black."""
    holes = Image.new("L", picture.size)
    for band, place in _bands(picture):
        _, alpha = _without_alpha(band)
        if alpha is not None:
            holes.paste(alpha.point(lambda value: 255 * (value < HALF)), place)
    return holes


def decode_mask(data: bytes, field: str, *, from_alpha: bool = False) -> Image.Image:
    """A mask, from a picture: white where that is at least half white, otherwise black. What is
    transparent counts as black, for editors save white strokes on nothing.

    Args:
        from_alpha: white where the picture is transparent by half and more, whatever its colours.

    Raises:
        RequestError: as `decode`; or the picture has no transparency, with `from_alpha`.
        MemoryError: as `decode`.
    """
    with _refusing(data, field):
        picture = _opened(data, field)
        if from_alpha:
            if not picture.has_transparency_data:
                raise RequestError(
                    f"{field}: the picture has no transparency; erase in it what is to change, or, "
                    "if that is white, set mask_from_alpha to false"
                )
            return _holes(picture)
        mask = Image.new("L", picture.size)
        for band, place in _bands(picture):
            opaque, alpha = _without_alpha(band)
            grey = opaque.convert("L")
            if alpha is not None:
                grey = ImageChops.multiply(grey, alpha)
            mask.paste(grey.point(lambda value: 255 * (value >= HALF)), place)
        return mask


@contextlib.contextmanager
def _refusing(data: bytes, field: str) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError:
        raise RequestError(
            f"{field}: the picture is over the limit of {MAX_INPUT_PIXELS} pixels; send a smaller "
            "one"
        ) from None
    except (MemoryError, RequestError):
        raise
    except Exception:
        # The decoders raise errors of a dozen kinds about such bytes, from RuntimeError to
        # struct.error, and their words are for programmers.
        raise RequestError(f"{field}: {_what_is_wrong_with(data)}") from None


def _opened(data: bytes, field: str) -> Image.Image:
    """The picture as the file has it, but upright."""
    picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    limit = MAX_WEBP_PIXELS if picture.format == "WEBP" else MAX_INPUT_PIXELS
    if picture.width * picture.height > limit:
        raise RequestError(
            f"{field}: a {picture.format} picture of {picture.width} x {picture.height} pixels is "
            f"over the limit of {limit} pixels; send a smaller one"
        )
    if picture.format == "JPEG" and data.count(_JPEG_SCAN) > MAX_JPEG_SCANS:
        raise RequestError(f"{field}: a JPEG of over {MAX_JPEG_SCANS} scans; save it anew")
    picture.load()
    return _upright(picture)


def _in_srgb(picture: Image.Image, *, on_white: bool = True) -> Image.Image:
    profile = picture.info.get("icc_profile")
    to_srgb = _to_srgb(profile, picture.mode) if profile else None
    if picture.mode == "RGB" and not picture.has_transparency_data and to_srgb is None:
        return picture
    result = Image.new("RGB", picture.size)
    for band, place in _bands(picture):
        result.paste(_plain(band, to_srgb, on_white=on_white), place)
    return result


def _bands(picture: Image.Image) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Rows after rows of it, and the place of each."""
    rows = max(1, _BAND_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        yield picture.crop((0, top, picture.width, min(top + rows, picture.height))), (0, top)


def _upright(picture: Image.Image) -> Image.Image:
    orientation = None
    with contextlib.suppress(Exception):  # what EXIF tells of a picture may be broken, or a lie
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _plain(band: Image.Image, to_srgb: ToSrgb | None, *, on_white: bool) -> Image.Image:
    band, alpha = _without_alpha(band)
    colours = to_srgb(band) if to_srgb else band.convert("RGB")
    if alpha is not None and on_white:
        colours.putalpha(alpha)
        white = Image.new("RGBA", colours.size, "white")
        colours = Image.alpha_composite(white, colours).convert("RGB")
    return colours


def _without_alpha(band: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The band in 8 bits, of which a channel of opacity is to be ignored; and the opacity."""
    alpha = None
    if band.mode.startswith("I;16"):
        key = band.info.pop("transparency", None)
        if key is not None:
            table = [255] * 2**16
            table[key] = 0
            alpha = band.convert("I").point(table, "L")
        # Pillow would clip 16 bits to 8; a depth map or a scan needs them scaled.
        band = band.point(lambda value: value / 257).convert("L")
    elif band.has_transparency_data:
        band = band.convert("RGBA")
        alpha = band.getchannel("A")
    return band, alpha


def _to_srgb(profile: bytes, mode: str) -> ToSrgb | None:
    """None if the profile says nothing of the picture that sRGB does not, or cannot be used."""
    grey = mode in ("1", "L", "LA") or mode.startswith("I;16")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        colours = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        if (colours == "CMYK") != (mode == "CMYK") or (colours == "L" and not grey):
            return None
        transform = ImageCms.ImageCmsTransform(
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            colours,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if colours != "CMYK":
            # Most profiles are sRGB by one name or another. Its pictures stay as they are.
            levels = bytes(itertools.chain(*itertools.product(range(0, 256, 15), repeat=3)))
            swatches = Image.frombytes("RGB", (len(levels) // 3, 1), levels).convert(colours)
            change = ImageChops.difference(transform.apply(swatches), swatches.convert("RGB"))
            if max(change.tobytes()) <= _UNSEEN:
                return None
    except Exception:  # of many kinds, about bytes that nobody vouches for
        return None

    def to_srgb(band: Image.Image) -> Image.Image:
        if band.mode != colours:
            band = band.convert("RGB").convert(colours)
        return transform.apply(band)

    return to_srgb


def _what_is_wrong_with(data: bytes) -> str:
    for name, signature in _SIGNATURES:
        if re.match(signature, data[:1024], re.DOTALL):
            if name in _DECODED:
                return (
                    f"the {name} picture is damaged, cut short or too large to decode; save it "
                    "anew, or smaller"
                )
            return f"not a picture that can be read ({name}); {WHAT_TO_SEND}"
    return f"not a picture that can be read; {WHAT_TO_SEND}"


def picture_of(
    data: bytes,
    field: str,
    *,
    height_px: int | None,
    width_px: int | None,
    how: How,
    bounds_px: tuple[int, int, int],
    masked_bounds_px: tuple[int, int, int] | None = None,
    mask_from_alpha: FromAlpha,
    mask_invert: bool,
) -> tuple[dict[str, Any], bytes, bytes]:
    """How it was fitted; the pixels, and those of the mask, one byte each, if there is one.

    Args:
        bounds_px: see `choose_fit`.
        masked_bounds_px: in their place, where `mask_from_alpha` makes a mask. None: the same.
    """
    alpha = None
    if mask_from_alpha == "if_any":
        picture, alpha = decode_with_any_alpha(data, field)
    elif mask_from_alpha:
        picture, alpha = decode_with_alpha(data, field, on_white=mask_invert)
    else:
        picture = decode(data, field)
    fit = choose_fit(
        picture.size,
        field,
        height_px=height_px,
        width_px=width_px,
        how=how,
        bounds_px=bounds_px if alpha is None else (masked_bounds_px or bounds_px),
    )
    mask = b""
    if alpha is not None:
        mask = _fitted_mask(
            alpha,
            "mask_from_alpha",
            fit,
            invert=mask_invert,
            nothing=(
                "nothing in the picture is half transparent, so nothing would be repainted; erase "
                "in it what is to change, or set mask_invert to repaint what is opaque"
            ),
            nothing_inverted=(
                "nothing in the picture is opaque, so with mask_invert nothing would be "
                "repainted; leave mask_invert out"
            ),
        )
    if alpha is not None and not mask_invert and math.prod(picture.size) <= MAX_PIXELS_WITH_HOLE:
        # Scaled with its hole, so that no colour comes out of that into what is kept.
        picture.putalpha(ImageChops.invert(alpha))
    pixels = fit.of_picture(picture).convert("RGB").tobytes()
    return {"sent_size": fit.sent_size, "size": fit.size, "how": fit.how}, pixels, mask


def mask_of(
    data: bytes,
    field: str,
    *,
    sent_size: tuple[int, int],
    size: tuple[int, int],
    how: How,
    from_alpha: bool = False,
    mask_invert: bool,
    repaints: bool = True,
) -> tuple[dict[str, Any], bytes]:
    """The mask's pixels, one byte each, fitted as its picture was.

    Args:
        repaints: what it is for, in messages: where to repaint, or where another picture counts.

    Raises:
        RequestError: as `decode_mask`; or it has not the shape of its picture, or is empty.
        MemoryError: as `decode`.
    """
    mask = decode_mask(data, field, from_alpha=from_alpha)
    (width, height), (sent_width, sent_height) = mask.size, sent_size
    difference = abs(width * sent_height - height * sent_width)
    # One in a hundred, or one pixel of the mask: who scales it has to round.
    if difference > max(width * sent_height / 100, sent_width, sent_height):
        turned = (width > height) != (sent_width > sent_height)
        raise RequestError(
            f"{field}: a mask of {width} x {height} pixels does not fit a picture of "
            f"{sent_width} x {sent_height}; send one of the same shape"
            + (" (a photograph may be turned by its EXIF orientation)" if turned else "")
        )
    if from_alpha:
        nothing = (
            "nothing in it is half transparent, so nothing would be repainted; erase in it what is "
            "to change, or, if that is white, set mask_from_alpha to false"
        )
        nothing_inverted = (
            "nothing in it is opaque, so with mask_invert nothing would be repainted; leave "
            "mask_invert out"
        )
    else:
        nothing = (
            "nothing in it is at least half white, so nothing would be repainted; paint white what "
            "is to change, or set mask_invert if that is black"
            if repaints
            else "nothing in it is at least half white, so the picture would count nowhere; paint "
            "white where it counts, or leave the mask out"
        )
        nothing_inverted = (
            "nothing in it is black, so with mask_invert nothing would be repainted; paint black "
            "what is to change, or leave mask_invert out if that is white"
        )
    pixels = _fitted_mask(
        mask,
        field,
        Fit((sent_width, sent_height), (size[0], size[1]), how),
        invert=mask_invert,
        nothing=nothing,
        nothing_inverted=nothing_inverted,
    )
    return {}, pixels


def _fitted_mask(
    mask: Image.Image, field: str, fit: Fit, *, invert: bool, nothing: str, nothing_inverted: str
) -> bytes:
    import numpy as np  # see fitting

    repainted = (np.asarray(mask) == 0) if invert else (np.asarray(mask) != 0)
    if not repainted.any():
        raise RequestError(f"{field}: {nothing_inverted if invert else nothing}")
    fitted = fit.of_mask(repainted)
    if not fitted.any():
        raise RequestError(
            f"{field}: what would be repainted is cut off with the edges of the picture; set fit "
            "to pad or stretch, or give height and width of the picture's own shape"
        )
    return fitted.tobytes()


def main() -> None:
    """Read the file from standard input and write, after a line of JSON, the pixels; or the
    refusal in that line. The argument is JSON too: the limits, what to make, and what that takes.
    """
    arguments = json.loads(sys.argv[1])
    memory_bytes, cpu_seconds = arguments.pop("memory_bytes"), arguments.pop("cpu_seconds")
    make: Callable[..., Any] = mask_of if arguments.pop("make") == "mask" else picture_of
    with contextlib.suppress(ValueError):  # a smaller limit is set already, or this is macOS
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    with contextlib.suppress(ValueError):
        # The first ends with a signal of its own; who catches it is ended a second later.
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    with contextlib.suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(_SET_SIGNAL_AT_PARENTS_END, signal.SIGKILL)
    output = sys.stdout.buffer
    answer: dict[str, Any]
    pixels: list[bytes] = []
    try:
        answer, *pixels = make(sys.stdin.buffer.read(), **arguments)
    except RequestError as error:
        answer = {"refusal": str(error)}
    except MemoryError:
        answer = {
            "refusal": f"{arguments['field']}: the picture takes more than "
            f"{memory_bytes // 1024**2} MB of memory to decode; send a smaller one"
        }
    output.write(json.dumps(answer).encode() + b"\n" + b"".join(pixels))


if __name__ == "__main__":
    main()
