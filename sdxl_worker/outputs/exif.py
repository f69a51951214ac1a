"""EXIF and XMP, in which JPEG and WebP carry what PNG has text chunks for.

EXIF holds `Software`, and the infotext as `UserComment`, where A1111's tools and Civitai look for
it: https://www.cipa.jp/std/documents/download_e.html?DC-008-Translation-2023-E. XMP holds the
other values, each as a property of the name that the text chunk has.
"""

import struct
import xml.etree.ElementTree as ET
from collections.abc import Mapping

INFOTEXT = "parameters"
"""The name that A1111 gave the infotext in a PNG."""
SOFTWARE = "Software"
XMP_NAMESPACE = "urn:sdxl-worker:"
# Of a segment's 65,535 bytes, its length and the name that XMP begins with take some.
MAX_JPEG_EXIF_BYTES = 65_533
MAX_JPEG_XMP_BYTES = 65_533 - len(b"http://ns.adobe.com/xap/1.0/\0")

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_META = "adobe:ns:meta/"
_TOOL = "http://ns.adobe.com/xap/1.0/"
for _prefix, _uri in (("rdf", _RDF), ("x", _META), ("xmp", _TOOL), ("sdxl", XMP_NAMESPACE)):
    ET.register_namespace(_prefix, _uri)
# What XML cannot hold, in JSON's spelling: nearly all values are JSON.
_NOT_IN_XML = {
    code: f"\\u{code:04x}" for code in [*range(9), 0xB, 0xC, *range(0xE, 32), 0xFFFE, 0xFFFF]
}

_SOFTWARE_TAG, _EXIF_IFD_TAG, _USER_COMMENT_TAG = 0x0131, 0x8769, 0x9286
_ASCII, _LONG, _UNDEFINED = 2, 4, 7  # types of TIFF


def fits_jpeg(text: Mapping[str, str]) -> bool:
    """Whether the segments of a JPEG have room for it."""
    return len(exif(text)) <= MAX_JPEG_EXIF_BYTES and len(xmp(text)) <= MAX_JPEG_XMP_BYTES


def exif(text: Mapping[str, str]) -> bytes:
    """Written by hand: Pillow would give UserComment a type at which some readers fail.

    Big-endian, as are the characters in UserComment: readers take either its byte order or that
    of the file.
    """
    software = text[SOFTWARE].encode("ascii") + b"\0"
    comment = b"UNICODE\0" + text[INFOTEXT].encode("utf-16-be")
    # Two directories, of two entries and of one, and then the values.
    exif_ifd = 8 + 2 + 2 * 12 + 4
    values = exif_ifd + 2 + 12 + 4
    return b"".join(
        [
            b"Exif\0\0MM",
            struct.pack(">HL", 42, 8),
            struct.pack(">H", 2),
            struct.pack(">HHLL", _SOFTWARE_TAG, _ASCII, len(software), values + len(comment)),
            struct.pack(">HHLL", _EXIF_IFD_TAG, _LONG, 1, exif_ifd),
            struct.pack(">L", 0),  # no other directory
            struct.pack(">H", 1),
            struct.pack(">HHLL", _USER_COMMENT_TAG, _UNDEFINED, len(comment), values),
            struct.pack(">L", 0),
            comment,
            software,
        ]
    )


def xmp(text: Mapping[str, str]) -> bytes:
    """https://www.iso.org/standard/75163.html"""
    root = ET.Element(f"{{{_META}}}xmpmeta")
    rdf = ET.SubElement(root, f"{{{_RDF}}}RDF")
    about = ET.SubElement(rdf, f"{{{_RDF}}}Description", {f"{{{_RDF}}}about": ""})
    ET.SubElement(about, f"{{{_TOOL}}}CreatorTool").text = text[SOFTWARE]
    for name, value in text.items():
        if name not in (SOFTWARE, INFOTEXT):
            ET.SubElement(about, f"{{{XMP_NAMESPACE}}}{name}").text = value.translate(_NOT_IN_XML)
    return ET.tostring(root, encoding="utf-8")
