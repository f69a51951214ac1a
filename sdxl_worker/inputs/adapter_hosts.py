"""Requests to the hosts of adapters' files: redirects, tokens, and what a refusal means."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from sdxl_worker.inputs import connections
from sdxl_worker.inputs.adapter_sources import (
    SourceError,
    hub_origin,
    is_civitai,
    may_be_asked,
    may_be_private,
    origin_of,
    token_for,
)
from sdxl_worker.inputs.fetch import MAX_REDIRECTS, REDIRECTS
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from yarl import URL

# Without a byte. Storage that has to find a large file first takes seconds.
STALL_SECONDS = 30.0
# Civitai's pages of a model with hundreds of pictures have some MB.
MAX_LISTING_BYTES = 16 * 1024**2
# Busy, or broken for now: another time it may be well.
PASSING = (408, 425, 429)


class UnreachableError(SourceError):
    """It may be well at another time."""


class BrokenOffError(UnreachableError):
    """It may be well at the next try."""


@contextlib.asynccontextmanager
async def answer(
    address: str, headers: Mapping[str, str], settings: Settings
) -> AsyncIterator["ClientResponse"]:
    """What an address, or what it redirects to, answers: 200, or 206 or 304 if `headers` ask so.

    Each host on the way is given the token that is its own, if any.

    Raises:
        SourceError: also in place of errors of the connection, in the caller's block too.
    """
    try:
        async with contextlib.AsyncExitStack() as stack:
            url = connections.url(address)
            for _ in range(MAX_REDIRECTS + 1):
                response = await _one_answer(stack, url, headers, settings)
                if response.status not in REDIRECTS:
                    break
                url = _redirected(url, response.headers.get("Location"), settings)
            else:
                raise SourceError(
                    f"its server redirects more than {MAX_REDIRECTS} times; use the final address"
                )
            expected = {200: True, 206: "Range" in headers, 304: "If-None-Match" in headers}
            if not expected.get(response.status):
                raise _refusal(response.status, response.headers, url, settings)
            yield response
    except TimeoutError:
        raise BrokenOffError(
            f"its server sent nothing for {STALL_SECONDS:g} seconds; try again, or use another"
        ) from None
    except connections.troubles() as error:
        kind = BrokenOffError if connections.may_pass(error) else SourceError
        raise kind(connections.cause(error)) from None


async def listing(address: str, settings: Settings) -> Any:
    """The JSON that an address gives.

    Raises:
        SourceError: it gives none.
    """
    body = bytearray()
    async with answer(address, {}, settings) as response:
        while chunk := await received(response):
            body += chunk
            if len(body) > MAX_LISTING_BYTES:
                raise SourceError("its server's list of files is too long; send the file's address")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise UnreachableError("its server's list of files is no JSON; try again") from None


async def received(response: "ClientResponse") -> bytes:
    """Some bytes of the body; none at its end. Within `answer`."""
    async with asyncio.timeout(STALL_SECONDS):
        return await response.content.readany()


async def _one_answer(
    stack: contextlib.AsyncExitStack, url: "URL", headers: Mapping[str, str], settings: Settings
) -> "ClientResponse":
    token = token_for(str(url), settings)
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    session = connections.session(private_allowed=may_be_private(str(url), settings))
    await stack.enter_async_context(session)
    async with asyncio.timeout(STALL_SECONDS):
        response = await session.get(
            url, headers={**headers, **authorization}, allow_redirects=False
        )
    return await stack.enter_async_context(response)


def _redirected(url: "URL", location: str | None, settings: Settings) -> "URL":
    if not location:
        raise SourceError("its server redirects to nowhere; use the final address")
    target = url.join(connections.url(location))
    if not may_be_asked(str(target), settings):
        raise SourceError(
            "its server redirects to something that is not https://; use the final address"
        )
    if is_civitai(origin_of(str(target))) and target.path == "/login":
        raise _refusal(401, {}, target, settings)
    return target


def _refusal(
    status: int, headers: Mapping[str, str], url: "URL", settings: Settings
) -> SourceError:
    words = connections.status_words(status)
    if status >= 500 or status in PASSING:
        return UnreachableError(f"its server answered {words}; try again later")
    is_denied = status in (401, 403)
    origin = origin_of(str(url))
    code = headers.get("X-Error-Code", "")
    if origin == hub_origin(settings):
        if is_denied and code == "GatedRepo":
            return SourceError(
                "its repository is gated: its conditions have to be accepted on its page, by the "
                "account of the token that the worker's owner sets as HF_TOKEN"
            )
        if is_denied and settings.hf_token:
            return SourceError(
                f"the Hub answered {words}: there is no such repository, or the worker's HF_TOKEN "
                "is not valid or may not read it"
            )
        if is_denied:
            return SourceError(
                f"the Hub answered {words}: there is no such repository, or it is private: then "
                "the worker's owner has to set HF_TOKEN"
            )
        if status == 404:
            what = {"EntryNotFound": "file in it", "RevisionNotFound": "revision of it"}
            return SourceError(f"the Hub has no such {what.get(code, 'repository or file')}")
    if is_civitai(origin):
        if is_denied and settings.civitai_token:
            return SourceError(
                f"Civitai answered {words}: the worker's CIVITAI_TOKEN is not valid, or its "
                "account may not have the file, which is perhaps in early access"
            )
        if is_denied:
            return SourceError(
                f"Civitai answered {words}: it wants a login for this file; the worker's owner has "
                "to set CIVITAI_TOKEN"
            )
        if status == 404:
            return SourceError("Civitai has no such file; was it removed?")
    return SourceError(f"its server answered {words}; is the address right, and open to everyone?")
