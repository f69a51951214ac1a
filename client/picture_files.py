"""Pictures as files: their names, how they are written, and what they tell of how they were made.

A worker on the platform leaves the prompts out of its files, unless its owner says otherwise. The
command knows them and adds them: to text chunks of a PNG, to EXIF and XMP of a JPEG or WebP. What
the picture itself is made of is copied byte for byte.
"""

import io
import json
import os
import re
import struct
import tempfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import piexif
from PIL import Image
from yarl import URL

SUFFIXES = {"PNG": ".png", "JPEG": ".jpeg", "WEBP": ".webp"}
"""Of Pillow's names of the formats that the worker makes."""
REQUEST = "request"
INFOTEXT = "parameters"
# In this order where the infotext has them.
PROMPTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
# They say how a picture is delivered, not how it is made.
OF_THE_DELIVERY = (
    "preview",
    "check",
    "on_too_large",
    "duplicate_first",
    "upload_urls",
    "return_maps",
)
MAX_SEED = 2**64 - 1
# Of the part that comes from the prompt; a file system takes 255 in all.
MAX_SLUG_BYTES = 80
# Of files that are not written to the end yet.
PART_PREFIX, PART_SUFFIX = ".sdxl-", ".part"

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_NAMESPACE = "urn:sdxl-worker:"
MAX_JPEG_SEGMENT_BYTES = 65_533
_EXIF_MARK, _XMP_MARK = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_META = "adobe:ns:meta/"
for _prefix, _uri in (
    ("rdf", _RDF),
    ("x", _META),
    ("xmp", "http://ns.adobe.com/xap/1.0/"),
    ("sdxl", XMP_NAMESPACE),
):
    ET.register_namespace(_prefix, _uri)
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


class PictureError(Exception):
    """What is there is no picture that can be read. The message says why."""


def slug(text: str) -> str:
    """A name for files: letters, digits and hyphens."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    return words.encode()[:MAX_SLUG_BYTES].decode(errors="ignore").rstrip("-") or "picture"


def suffix_of(content: bytes) -> str:
    """
    Raises:
        PictureError: it is no PNG, JPEG or WebP.
    """
    with _opened(content) as picture:
        return SUFFIXES[str(picture.format)]


def write_new(content: bytes, path: Path) -> Path:
    """Write a file beside those that are there, with a number in its name where that is taken."""
    number = 1
    while True:
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            target.touch(exist_ok=False)  # the name is ours
        except FileExistsError:
            number += 1
            continue
        try:
            write(content, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return target


def write(content: bytes, path: Path) -> None:
    """Write a file, in whole or not at all, in the place of one that is there."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=PART_PREFIX, suffix=PART_SUFFIX, delete=False
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            umask = os.umask(0)
            os.umask(umask)
            Path(file.name).chmod(0o666 & ~umask)  # temporary files are for their owner alone
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read(content: bytes) -> dict[str, str]:
    """What a picture's file tells, by the names of its text chunks.

    Raises:
        PictureError: it is no PNG, JPEG or WebP.
    """
    try:
        with _opened(content) as picture:
            if picture.format == "PNG":  # its text chunks are there without decoding it
                return {
                    str(name): text for name, text in picture.info.items() if isinstance(text, str)
                }
            told = _xmp_values(picture.info.get("xmp", b""))
            comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except (OSError, ValueError, SyntaxError, KeyError, struct.error):
        raise PictureError("its metadata cannot be read") from None
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        told[INFOTEXT] = comment[8:].decode("utf-16-be", "replace")
    return told


def request_in(told: Mapping[str, str]) -> dict[str, Any] | None:
    """The request that makes the picture again, if the file has one."""
    try:
        request = json.loads(told.get(REQUEST, ""))
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    # Whoever made the file does not choose where pictures go.
    return {name: value for name, value in request.items() if name not in OF_THE_DELIVERY}


def completed(content: bytes, job_input: Mapping[str, Any], seed: int) -> bytes:
    """The file with the prompts in it; as it is where it has them, or where they do not fit.

    Args:
        content: what the worker made.
        job_input: what it was asked for.
        seed: of this picture.

    Raises:
        PictureError: it is no PNG, JPEG or WebP.
    """
    told = read(content)
    prompts = {name: job_input[name] for name in PROMPTS if job_input.get(name)}
    request = request_in(told)
    if request is not None and prompts.keys() <= request.keys():
        return content
    if request is None:
        delivery = {name: job_input[name] for name in job_input if name not in OF_THE_DELIVERY}
        request = {**_without_secrets(delivery), "seed": seed, "num_images": 1}
    request = prompts | {name: value for name, value in request.items() if name not in prompts}
    text = {REQUEST: json.dumps(request, ensure_ascii=False)}
    if (infotext := told.get(INFOTEXT, "")).startswith("Steps: "):
        text[INFOTEXT] = _with_prompts(infotext, request)
    with _opened(content) as picture:
        try:
            match picture.format:
                case "PNG":
                    return _png_with(content, text)
                case "JPEG":
                    return _jpeg_with(content, text)
            return _webp_with(content, text, picture.size)
        except Exception:  # a damaged file, in any of many ways, is saved as it came
            return content


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=tuple(SUFFIXES))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise PictureError("it is no PNG, JPEG or WebP that can be read") from None


def _without_secrets(value: Any) -> Any:
    """An address without user, password and query; of a data URI, its type."""
    if isinstance(value, dict):
        return {name: _without_secrets(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_secrets(one) for one in value]
    if isinstance(value, str) and value[:5].lower() == "data:":
        return value.partition(",")[0]
    if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
        try:
            return str(URL(value).with_user(None).with_query(None).with_fragment(None))
        except ValueError:
            return ""
    return value


def _with_prompts(infotext: str, request: Mapping[str, Any]) -> str:
    """A1111's infotext as the worker writes it where it may tell the prompts."""
    lines = [infotext]
    if negative := request.get("negative_prompt"):
        lines.insert(0, f"Negative prompt: {negative}")
    loras = [
        f"<lora:{PurePosixPath(one['path']).stem}:{one.get('scale', 1):g}>"
        for one in request.get("loras") or ()
    ]
    if words := [word for word in (request.get("prompt"), *loras) if word]:
        lines.insert(0, " ".join(words))
    return "\n".join(lines)


# PNG: https://www.w3.org/TR/png-3/#5Chunk-layout


def _png_with(content: bytes, text: Mapping[str, str]) -> bytes:
    parts = [PNG_SIGNATURE]
    keywords = tuple(name.encode("latin-1") + b"\0" for name in text)
    for kind, chunk in _png_chunks(content):
        if kind in (b"tEXt", b"iTXt", b"zTXt") and chunk[8:].startswith(keywords):
            continue
        parts.append(chunk)
        if kind == b"IHDR":
            parts += [_png_text(name, value) for name, value in text.items()]
    return b"".join(parts)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(content):
        [length] = struct.unpack_from(">I", content, position)
        yield content[position + 4 : position + 8], content[position : position + 12 + length]
        position += 12 + length


def _png_text(name: str, value: str) -> bytes:
    """tEXt, or iTXt where there is more than ASCII in it; neither is compressed."""
    if value.isascii() and "\0" not in value:
        kind, data = b"tEXt", name.encode("latin-1") + b"\0" + value.encode("ascii")
    else:
        data = name.encode("latin-1") + b"\0\0\0\0\0" + value.encode("utf-8", "replace")
        kind = b"iTXt"
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# JPEG: https://www.w3.org/Graphics/JPEG/itu-t81.pdf, B.1.1.4. Segments end where the pixels begin.


def _jpeg_with(content: bytes, text: Mapping[str, str]) -> bytes:
    exif, xmp, kept, position = b"", b"", [], 2
    while content[position : position + 2] != b"\xff\xda":
        marker, length = struct.unpack_from(">HH", content, position)
        segment = content[position : position + 2 + length]
        position += 2 + length
        if marker == 0xFFE1 and segment[4:].startswith(_EXIF_MARK):
            exif = segment[4:]
        elif marker == 0xFFE1 and segment[4:].startswith(_XMP_MARK):
            xmp = segment[4 + len(_XMP_MARK) :]
        else:
            kept.append(segment)
    added = [_exif_with(exif, text), _XMP_MARK + _xmp_with(xmp, text)]
    if any(len(data) > MAX_JPEG_SEGMENT_BYTES for data in added):
        return content
    segments = [b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data for data in added if data]
    # JFIF's own segment has to be the first.
    first = 1 if kept and kept[0][:2] == b"\xff\xe0" else 0
    return b"".join([content[:2], *kept[:first], *segments, *kept[first:], content[position:]])


# WebP: https://developers.google.com/speed/webp/docs/riff_container


def _webp_with(content: bytes, text: Mapping[str, str], size_px: tuple[int, int]) -> bytes:
    chunks: dict[bytes, bytes] = {}
    position = 12
    while position + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, position)
        chunks.setdefault(kind, content[position + 8 : position + 8 + length])
        position += 8 + length + length % 2
    flags = chunks[b"VP8X"][0] if b"VP8X" in chunks else 0
    # A lossless picture says itself whether it has transparency.
    if b"VP8L" in chunks and chunks[b"VP8L"][4] & 0x10:
        flags |= 0x10
    exif = _exif_with(chunks.pop(b"EXIF", b""), text).removeprefix(_EXIF_MARK)
    xmp = _xmp_with(chunks.pop(b"XMP ", b""), text)
    flags |= 0x04 | (0x08 if exif else 0)
    width, height = size_px
    header = struct.pack("<B3x", flags) + b"".join(
        struct.pack("<I", side - 1)[:3] for side in (width, height)
    )
    chunks.pop(b"VP8X", None)
    ordered = {b"VP8X": header, **chunks, **({b"EXIF": exif} if exif else {}), b"XMP ": xmp}
    body = b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in ordered.items()
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _exif_with(exif: bytes, text: Mapping[str, str]) -> bytes:
    """With the infotext as UserComment, where there is one: A1111's tools look for it there."""
    if INFOTEXT not in text:
        return exif
    if exif and not exif.startswith(_EXIF_MARK):
        exif = _EXIF_MARK + exif
    values = piexif.load(exif) if exif else {"0th": {}, "Exif": {}}
    comment = b"UNICODE\0" + text[INFOTEXT].encode("utf-16-be", "replace")
    values["Exif"][_USER_COMMENT] = comment
    return bytes(piexif.dump(values))


def _xmp_values(xmp: bytes) -> dict[str, str]:
    try:
        root = ET.fromstring(xmp)  # noqa: S314  expat bounds what entities become
    except (ET.ParseError, LookupError, ValueError):  # the latter of its encoding
        return {}
    return {
        element.tag.removeprefix(f"{{{XMP_NAMESPACE}}}"): element.text or ""
        for element in root.iter()
        if element.tag.startswith(f"{{{XMP_NAMESPACE}}}")
    }


def _xmp_with(xmp: bytes, text: Mapping[str, str]) -> bytes:
    try:
        root = ET.fromstring(xmp)  # noqa: S314  expat bounds what entities become
    except (ET.ParseError, LookupError, ValueError):  # the latter of its encoding
        root = ET.Element(f"{{{_META}}}xmpmeta")
    about = root.find(f".//{{{_RDF}}}Description")
    if about is None:
        rdf = ET.SubElement(root, f"{{{_RDF}}}RDF")
        about = ET.SubElement(rdf, f"{{{_RDF}}}Description", {f"{{{_RDF}}}about": ""})
    tag = f"{{{XMP_NAMESPACE}}}{REQUEST}"
    element = about.find(tag)
    element = ET.SubElement(about, tag) if element is None else element
    # JSON escapes whatever XML cannot hold.
    element.text = json.dumps(json.loads(text[REQUEST]))
    return ET.tostring(root, encoding="utf-8")
