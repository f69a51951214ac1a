"""Connections to hosts that a job names, which may be slow, endless or hostile.

They are made and used in a thread of their own, which no other job, nor the end of the worker,
waits for. Unless private addresses are allowed, only public ones are connected to.
"""

import asyncio
import functools
import http
import os
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import sdxl_worker
from sdxl_worker.inputs.addresses import is_public

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from yarl import URL

T = TypeVar("T")

# The SDK's name: whoever allows its downloads private addresses means all of a job's.
ALLOW_PRIVATE = "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"
PUBLIC_ONLY = "the worker connects to public addresses only: use one"


class NotPublicError(OSError):
    """Raised in place of a connection."""


def are_private_allowed() -> bool:
    """Whether the owner lets jobs name private addresses."""
    return os.environ.get(ALLOW_PRIVATE, "").strip().lower() in ("1", "true", "yes")


async def away(work: Coroutine[Any, Any, T]) -> T:
    """Run what uses such connections, in their thread. When cancelled, so is the work."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop()))


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Of a thread of its own: servers that flood it with small parts keep it busy, and not the loop
    that takes jobs, stops them and posts their results."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="connections", daemon=True).start()
    return loop


def session(*, private_allowed: bool) -> "ClientSession":
    """A session without a deadline: it belongs around all that is done with it."""
    # Imported here because a worker imports runpod, and with it aiohttp, while its models load.
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=_resolver(),
            socket_factory=None if private_allowed else _public_socket,
            force_close=True,
        ),
        headers={"User-Agent": f"sdxl-worker/{sdxl_worker.__version__}"},
        timeout=aiohttp.ClientTimeout(total=None),
        # Through a proxy, the proxy would look up the host, and could reach private ones.
        trust_env=private_allowed,
    )


def is_private(address: str) -> bool:
    """Whether an address can be told to be no public one without a look at the network."""
    host = urlsplit(address).hostname or ""
    try:
        ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return not is_public(host)


def troubles() -> tuple[type[Exception], ...]:
    """What a connection may fail with; `cause` words it."""
    import aiohttp

    return (aiohttp.ClientError, OSError, ValueError)


def cause(error: Exception) -> str:
    """What is wrong and what to do, without a word of the address or of the server."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its server's certificate is not valid: use another server"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its host cannot be found: correct the address"
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, NotPublicError):
            return PUBLIC_ONLY
        return "its server cannot be reached: correct the address"
    if isinstance(error, ValueError):
        return "not an address that can be used: correct it"
    return "its server broke off, or does not speak HTTP: try again"


def may_pass(error: Exception) -> bool:
    """Whether the same address may be well at another time."""
    import aiohttp

    is_private = isinstance(getattr(error, "os_error", None), NotPublicError)
    return not (
        is_private or isinstance(error, ValueError | aiohttp.ClientConnectorCertificateError)
    )


def status_words(code: int) -> str:
    """Not in the server's words, which can be anything."""
    try:
        return f"{code} {http.HTTPStatus(code).phrase}"
    except ValueError:
        return str(code)


def url(address: str) -> "URL":
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
        NotPublicError: this worker must not go there.
    """
    family, kind, protocol, _, address = address_info
    if not is_public(address[0]):
        raise NotPublicError
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
