"""An address, or a data URI, becomes bytes. Only public addresses are fetched.

Whoever sends a job chooses the server, which may be slow, endless or hostile. So one deadline
covers all of it, and a job that is cancelled closes its connection at once.
"""

import asyncio
import base64
import binascii
import http
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import connections

if TYPE_CHECKING:
    from yarl import URL

MAX_DOWNLOAD_BYTES = 50 * 1024**2
# From the first look at the address to the last byte, redirects included.
FETCH_TIMEOUT_SECONDS = 20.0
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 64 * 1024

ELSE_SEND_IT = "or send the picture itself as a data:image/ URI"


async def fetch(address: str, field: str) -> bytes:
    """
    Args:
        address: http://, https:// or data:, as the request's rules allow.
        field: the place of `address` in the request, for messages.

    Raises:
        RequestError: nothing can be fetched from there. The message holds nothing of the address,
            which may have secrets in any part.
    """
    if address[:5].lower() == "data:":
        return await asyncio.to_thread(_decoded_data_uri, address, field)
    return await connections.away(_fetched_in_time(address, field))


async def _fetched_in_time(address: str, field: str) -> bytes:
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_SECONDS):
            return await _fetched(address, field)
    except TimeoutError:
        raise RequestError(
            f"{field}: its server did not send it within {FETCH_TIMEOUT_SECONDS:g} seconds in all; "
            f"use a faster server, {ELSE_SEND_IT}"
        ) from None


def _decoded_data_uri(uri: str, field: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not (header.lower().endswith(";base64") and comma):
        raise RequestError(
            f"{field}: a data URI must read data:image/png;base64, (or another picture type) "
            "and then the picture in base64"
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            f"{field}: what follows base64, is not valid base64: encode the picture again"
        ) from None


async def _fetched(address: str, field: str) -> bytes:
    try:
        private_allowed = connections.are_private_allowed()
        async with connections.session(private_allowed=private_allowed) as session:
            return await _following(session, connections.url(address), field)
    except connections.troubles() as error:
        raise RequestError(f"{field}: {connections.cause(error)}, {ELSE_SEND_IT}") from None


async def _following(session: Any, url: "URL", field: str) -> bytes:
    """The body that an address, or what it redirects to, gives."""
    for _ in range(MAX_REDIRECTS + 1):
        async with session.get(url, allow_redirects=False) as response:
            if response.status in REDIRECTS:
                url = _redirected(url, response.headers.get("Location"), field)
                continue
            if response.status != http.HTTPStatus.OK:
                status = connections.status_words(response.status)
                raise RequestError(
                    f"{field}: its server answered {status}; is the address right, and open to "
                    "everyone?"
                )
            return await _body(response, field)
    raise RequestError(
        f"{field}: its server redirects more than {MAX_REDIRECTS} times; use the final address"
    )


def _redirected(url: "URL", location: str | None, field: str) -> "URL":
    if not location:
        raise RequestError(f"{field}: its server redirects to nowhere; use the final address")
    url = url.join(connections.url(location))
    if url.scheme not in ("http", "https"):
        raise RequestError(
            f"{field}: its server redirects to something that is not http:// or https://; use the "
            "final address"
        )
    return url


async def _body(response: Any, field: str) -> bytes:
    body = bytearray()
    too_large = (response.content_length or 0) > MAX_DOWNLOAD_BYTES
    while not too_large and (chunk := await response.content.read(CHUNK_BYTES)):
        body += chunk
        too_large = len(body) > MAX_DOWNLOAD_BYTES
    if too_large:
        raise RequestError(
            f"{field}: its server sends more than {MAX_DOWNLOAD_BYTES // 1024**2} MB; use a "
            "smaller picture"
        )
    return bytes(body)
