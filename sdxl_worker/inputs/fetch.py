"""An address, or a data URI, becomes bytes. Only public addresses are fetched.

Whoever sends a job chooses the server, which may be slow, endless or hostile. So one deadline
covers all of it, a job that is cancelled closes its connection at once, and all of it is done in
threads that no other job, nor the end of the worker, waits for.
"""

import asyncio
import base64
import binascii
import functools
import http
import os
import socket
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import sdxl_worker
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.addresses import is_public

if TYPE_CHECKING:
    from yarl import URL

MAX_DOWNLOAD_BYTES = 50 * 1024**2
# From the first look at the address to the last byte, redirects included.
FETCH_TIMEOUT_SECONDS = 20.0
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 64 * 1024
# The SDK's name: whoever allows its downloads private addresses means these downloads, too.
ALLOW_PRIVATE = "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"

ELSE_SEND_IT = "or send the picture itself as a data:image/ URI"


class _NotPublicError(OSError):
    """Raised in place of a connection."""


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
    fetching = asyncio.run_coroutine_threadsafe(_fetched_in_time(address, field), _loop())
    return await asyncio.wrap_future(fetching)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Of a thread of its own: servers that flood it with small parts keep it busy, and not the loop
    that takes jobs, stops them and posts their results."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fetch", daemon=True).start()
    return loop


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
    # Imported here because a worker imports runpod, and with it aiohttp, while its models load.
    import aiohttp

    is_private_allowed = os.environ.get(ALLOW_PRIVATE, "").strip().lower() in ("1", "true", "yes")
    connector = aiohttp.TCPConnector(
        resolver=_resolver(),
        socket_factory=None if is_private_allowed else _public_socket,
        force_close=True,
    )
    try:
        async with aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": f"sdxl-worker/{sdxl_worker.__version__}"},
            timeout=aiohttp.ClientTimeout(total=None),  # the deadline is around all of it
            # Through a proxy, the proxy would look up the host, and could reach private ones.
            trust_env=is_private_allowed,
        ) as session:
            return await _following(session, _url(address), field)
    except aiohttp.ClientConnectorCertificateError:
        reason = "its server's certificate is not valid: use another server"
    except aiohttp.ClientConnectorDNSError:
        reason = "its host cannot be found: correct the address"
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, _NotPublicError):
            reason = "the worker fetches from public addresses only: use one"
        else:
            reason = "its server cannot be reached: correct the address"
    except ValueError:
        reason = "not an address that can be fetched: correct it"
    except (aiohttp.ClientError, OSError):
        reason = "its server broke off, or does not speak HTTP: try again"
    raise RequestError(f"{field}: {reason}, {ELSE_SEND_IT}") from None


async def _following(session: Any, url: "URL", field: str) -> bytes:
    """The body that an address, or what it redirects to, gives."""
    for _ in range(MAX_REDIRECTS + 1):
        async with session.get(url, allow_redirects=False) as response:
            if response.status in REDIRECTS:
                url = _redirected(url, response.headers.get("Location"), field)
                continue
            if response.status != http.HTTPStatus.OK:
                raise RequestError(
                    f"{field}: its server answered {_status(response.status)}; is the address "
                    "right, and open to everyone?"
                )
            return await _body(response, field)
    raise RequestError(
        f"{field}: its server redirects more than {MAX_REDIRECTS} times; use the final address"
    )


def _redirected(url: "URL", location: str | None, field: str) -> "URL":
    if not location:
        raise RequestError(f"{field}: its server redirects to nowhere; use the final address")
    url = url.join(_url(location))
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


def _status(code: int) -> str:
    """Not in the server's words, which can be anything."""
    try:
        return f"{code} {http.HTTPStatus(code).phrase}"
    except ValueError:
        return str(code)


def _url(address: str) -> "URL":
    """
    Raises:
        ValueError: it cannot be read as an address.
    """
    from yarl import URL

    # A signature in the query covers how the address is written, so what can be sent as it is, is.
    encoded = address.isascii() and address.isprintable() and " " not in address
    try:
        return URL(address, encoded=encoded)
    except Exception as error:  # "http://]a[@/" is an IndexError
        raise ValueError from error


def _public_socket(address_info: Any) -> socket.socket:
    """For each connection, the socket to dial with: the last look at where it leads, so neither a
    redirect nor a name that resolves to something else the second time gets around it.

    Raises:
        _NotPublicError: this worker must not go there.
    """
    family, kind, protocol, _, address = address_info
    if not is_public(address[0]):
        raise _NotPublicError
    return socket.socket(family, kind, protocol)


def _resolver() -> Any:
    """Looks up hosts in threads of its own, which nothing waits for at the worker's end.

    aiohttp's takes those of `asyncio.to_thread`: a few names whose servers do not answer would
    keep all jobs, and the end of the worker, waiting for them.
    """
    from aiohttp.abc import AbstractResolver, ResolveResult

    class Resolver(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            found = await _in_own_thread(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
            return [
                ResolveResult(
                    hostname=host,
                    host=address[0],
                    port=port,
                    family=family,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
                for family, _, protocol, _, address in found
            ]

        async def close(self) -> None:
            pass

    return Resolver()


async def _in_own_thread(function: Any, *args: Any) -> Any:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # it cannot be stopped, and whoever waits may leave

    def run() -> None:
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="resolver", daemon=True).start()
    return await asyncio.wrap_future(future)
