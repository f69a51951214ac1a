"""An endpoint over HTTP: Runpod's, or one that speaks as it does."""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

PLATFORM = "https://api.runpod.ai/v2"
# Those of `make endpoint`, which has the placeholders of Runpod's documents.
LOCAL_URL = "http://127.0.0.1:8000/v2/ENDPOINT_ID"
LOCAL_KEY = "YOUR_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

# However slow the line is, as long as something comes.
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=100)
# How long nothing may come back before it is given up; jobs go on meanwhile.
TROUBLE_SECONDS = 600
DOWNLOAD_TROUBLE_SECONDS = 60
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
# Of a job that is cancelled because the command was interrupted.
CANCEL_SECONDS = 15
MAX_PICTURE_BYTES = 256 * 1024**2
MAX_ANSWER_SHOWN_CHARACTERS = 300


class EndpointError(Exception):
    """What the endpoint did not do. The message is for people, and holds no key."""


class WrongEndpointError(EndpointError):
    """No job would get through: the address, the key or the service is wrong."""


class NotThereError(WrongEndpointError):
    """There is no such job, or no such endpoint."""


class UnknownFateError(EndpointError):
    """A job was sent, and whether it was taken is not known."""


@dataclass(frozen=True)
class Address:
    """Where an endpoint is, and its key."""

    url: str
    api_key: str = field(repr=False)

    @property
    def host(self) -> str:
        return URL(self.url).host or ""


def find_address(endpoint: str | None, api_key_file: str | None) -> Address:
    """The endpoint that is asked for, or that of the environment, or the one on this machine.

    Raises:
        WrongEndpointError: it is no endpoint, or has no key.
    """
    named = endpoint or os.environ.get("SDXL_ENDPOINT") or os.environ.get("RUNPOD_ENDPOINT_ID")
    url = (named or LOCAL_URL).strip().rstrip("/")
    if re.fullmatch(r"[A-Za-z0-9_-]+", url):
        url = f"{PLATFORM}/{url}"
    for route in ("/run", "/runsync"):
        url = url.removesuffix(route)
    try:
        parsed = URL(url)
    except ValueError:
        parsed = URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise WrongEndpointError(
            "--endpoint: must be an endpoint's id or its http:// or https:// address, such as "
            f"{PLATFORM}/ENDPOINT_ID"
        )
    if parsed.user or parsed.password:
        raise WrongEndpointError("--endpoint: must not have a user or a password in it")
    host = parsed.host
    key = _key_in(api_key_file) if api_key_file else os.environ.get("SDXL_API_KEY", "")
    # The key of the platform is not shown to others.
    is_platform = host == "runpod.ai" or host.endswith(".runpod.ai")
    if is_platform and parsed.scheme != "https":
        raise WrongEndpointError(
            f"--endpoint: {host} is asked over https:// alone: without it, all on the way would "
            "see the API key"
        )
    if not key and is_platform:
        key = os.environ.get("RUNPOD_API_KEY", "")
    if not key and host in LOOPBACK:
        key = LOCAL_KEY
    if not key:
        of_platform = " or RUNPOD_API_KEY" if is_platform else ""
        raise WrongEndpointError(
            f"{host} needs an API key: set SDXL_API_KEY{of_platform}, or give a file that has it "
            "with --api-key-file"
        )
    if not key.isascii() or not key.isprintable():
        raise WrongEndpointError(
            "the API key has characters in it that no key has: see SDXL_API_KEY, RUNPOD_API_KEY or "
            "--api-key-file"
        )
    return Address(url, key)


def _key_in(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise WrongEndpointError(f"--api-key-file: {path} cannot be read: {reason}") from None


class Endpoint:
    """One endpoint, inside `async with`.

    Questions are asked again where the network, the limit of requests (429) or the service (5xx)
    is in trouble. A job is sent again only where it is certain that it was not taken.
    """

    def __init__(
        self, address: Address, on_trouble: Callable[[str], None] = lambda _: None
    ) -> None:
        """
        Args:
            on_trouble: called with what is the matter, before something is tried again.
        """
        self.address = address
        self._on_trouble = on_trouble

    async def __aenter__(self) -> Self:
        self._session = _session()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def run(self, job_input: dict[str, Any], on_taken: Callable[[str], None]) -> str:
        """Send a job and return its id.

        Args:
            on_taken: called with the id, also where this is cancelled meanwhile.

        Raises:
            EndpointError: it was refused.
            UnknownFateError: the answer was lost.
        """
        patience = _Patience()
        while True:
            sending = asyncio.ensure_future(self._send(job_input))
            try:
                code, answer, wait_seconds = await asyncio.shield(sending)
            except asyncio.CancelledError:
                # A job that is on its way can be cancelled only when its id has come back.
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    code, answer, _ = await asyncio.wait_for(sending, CANCEL_SECONDS)
                    if job_id := _job_id(code, answer):
                        on_taken(job_id)
                    if job_id or 400 <= code < 500:
                        raise
                raise self._unknown("interrupted") from None
            except aiohttp.ClientSSLError as error:  # nothing was sent, here and below
                raise WrongEndpointError(f"{self.address.url}: {_cause(error)}") from None
            except aiohttp.ClientConnectorError as error:
                if self.address.host in LOOPBACK:
                    raise WrongEndpointError(
                        f"nothing answers at {self.address.url}: start the endpoint with "
                        "`sdxl serve` or `make endpoint`, or name another one with --endpoint"
                    ) from None
                trouble, wait_seconds = f"{self.address.host}: {_cause(error)}", None
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._unknown(_cause(error)) from None
            else:
                if job_id := _job_id(code, answer):
                    on_taken(job_id)
                    return job_id
                if code == 200 or code >= 500:
                    raise self._unknown(f"{code}{_told(answer)}")
                if code != 429:
                    raise self._refusal(code, answer)
                trouble = "the endpoint takes no more requests for now (429)"
            await self._pause(patience, trouble, wait_seconds)

    async def status(self, job_id: str) -> dict[str, Any]:
        """What is known of a job.

        Raises:
            EndpointError: the endpoint does not know the job, or is not to be reached for long.
        """
        return await self._persist("GET", f"status/{_segment(job_id)}", TROUBLE_SECONDS)

    async def cancel(self, job_id: str) -> str:
        """Cancel a job and return its status: one that had ended stays as it was.

        Raises:
            EndpointError: it cannot be told whether it is cancelled.
        """
        answer = await self._persist("POST", f"cancel/{_segment(job_id)}", CANCEL_SECONDS)
        return str(answer.get("status"))

    async def download(self, link: str) -> bytes:
        """The picture at a link, which gets no key.

        Raises:
            EndpointError: it cannot be had, or is too large.
        """
        patience = _Patience(DOWNLOAD_TROUBLE_SECONDS)
        place = _without_query(link)
        while True:
            try:
                if URL(link).scheme not in ("http", "https"):
                    raise EndpointError(f"{place}: is no http or https address")
                async with self._session.get(link, max_redirects=5) as response:
                    if response.status == 200:
                        return await _bounded(response, place)
                    trouble = f"{place}: the storage answered {response.status}"
                    if response.status < 500 and response.status != 429:
                        raise EndpointError(trouble)
            except aiohttp.ClientSSLError as error:
                raise EndpointError(f"{place}: {_cause(error)}") from None
            except ValueError:  # aiohttp's errors of addresses are this, too
                raise EndpointError(f"{place}: is no address that can be asked") from None
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = f"{place}: {_cause(error)}"
            await self._pause(patience, trouble, None)

    async def _persist(self, method: str, route: str, seconds: float) -> dict[str, Any]:
        patience = _Patience(seconds)
        while True:
            wait_seconds = None
            try:
                code, answer, wait_seconds = await self._ask(method, route)
            except aiohttp.ClientSSLError as error:
                raise WrongEndpointError(f"{self.address.url}: {_cause(error)}") from None
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = f"{self.address.host}: {_cause(error)}"
            else:
                if code == 200 and isinstance(answer, dict):
                    return answer
                if code != 200 and code != 429 and code < 500:
                    raise self._refusal(code, answer)
                trouble = f"the endpoint answered {code}{_told(answer)}"
            await self._pause(patience, trouble, wait_seconds)

    async def _send(self, job_input: dict[str, Any]) -> tuple[int, Any, float | None]:
        """Over a new connection: one that was kept may be closed just now, and the job be lost."""
        async with _session() as session:
            return await self._ask("POST", "run", {"input": job_input}, session)

    async def _ask(
        self,
        method: str,
        route: str,
        body: Any = None,
        session: aiohttp.ClientSession | None = None,
    ) -> tuple[int, Any, float | None]:
        """The status code, the answer, and how long the endpoint wants to be left alone."""
        async with (session or self._session).request(
            method,
            f"{self.address.url}/{route}",
            json=body,
            headers={"Authorization": f"Bearer {self.address.api_key}"},
            allow_redirects=False,  # the key is for this address alone
        ) as response:
            if 300 <= response.status < 400:
                target = "another address"
                with contextlib.suppress(ValueError):
                    target = URL(response.headers.get("Location", "")).host or target
                raise WrongEndpointError(
                    f"{self.address.host} redirects to {target}, which was not followed: the API "
                    "key is not for others. Name the right address with --endpoint"
                )
            text = await response.text(errors="replace")
            wait = response.headers.get("Retry-After", "")
            answer: Any = text
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(text)
            return response.status, answer, float(wait) if wait.isdecimal() else None

    async def _pause(self, patience: "_Patience", trouble: str, wait_seconds: float | None) -> None:
        pause = patience.next_pause()
        if pause is None:
            raise EndpointError(f"{trouble}; tried for {patience.seconds:g} s")
        self._on_trouble(trouble)
        await asyncio.sleep(min(max(pause, wait_seconds or 0), 4 * LONGEST_PAUSE_SECONDS))

    def _unknown(self, reason: str) -> UnknownFateError:
        return UnknownFateError(
            f"the job was sent, but {self.address.host} did not say that it took it ({reason}): "
            "whether it did is not known, and it was not sent again. See the endpoint's requests "
            "before you do"
        )

    def _refusal(self, code: int, answer: Any) -> EndpointError:
        host = self.address.host
        match code:
            case 401 | 403:
                return WrongEndpointError(
                    f"{host} does not take the API key ({code}): see SDXL_API_KEY, RUNPOD_API_KEY "
                    "or --api-key-file"
                )
            case 404:
                return NotThereError(
                    f"nothing is at {self.address.url} (404): give the endpoint's id, or its "
                    "address as far as /v2/ENDPOINT_ID, with --endpoint"
                )
            case 413:
                return EndpointError(f"the request is too large for {host}{_told(answer)}")
        return EndpointError(f"{host} answered {code}{_told(answer)}")


class _Patience:
    """How long to wait before the next try: longer each time, until there was trouble for long."""

    def __init__(self, seconds: float = TROUBLE_SECONDS) -> None:
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self._pause = FIRST_PAUSE_SECONDS

    def next_pause(self) -> float | None:
        if time.monotonic() > self._until:
            return None
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return pause


def _session() -> aiohttp.ClientSession:
    # No cookie jar, no .netrc: nothing but the key says who asks.
    return aiohttp.ClientSession(
        timeout=REQUEST_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
    )


def _job_id(code: int, answer: Any) -> str | None:
    found = answer.get("id") if code == 200 and isinstance(answer, dict) else None
    return found if isinstance(found, str) and found else None


async def _bounded(response: aiohttp.ClientResponse, place: str) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_chunked(2**16):
        content += chunk
        if len(content) > MAX_PICTURE_BYTES:
            raise EndpointError(f"{place}: is larger than {MAX_PICTURE_BYTES // 1024**2} MB")
    return bytes(content)


def _segment(job_id: str) -> str:
    """Ids are opaque; as a part of an address they must not lead elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", job_id):
        raise EndpointError("the endpoint gave the job an id that cannot be asked for")
    return job_id


def _told(answer: Any) -> str:
    """What an answer says of its reason, to be appended."""
    if isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or ""
    text = " ".join(str(answer or "").split())
    if not text or text.startswith("<"):  # a page of a proxy
        return ""
    return f": {text[:MAX_ANSWER_SHOWN_CHARACTERS]}"


def _cause(error: BaseException) -> str:
    """In words that hold nothing of what was sent."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name is not found"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return "its certificate is not trusted, or it does not speak https"
    if isinstance(error, aiohttp.ClientOSError):
        return error.strerror or "the connection broke"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "the connection broke"
    return type(error).__name__


def _without_query(link: str) -> str:
    """Presigned links have their signature in the query."""
    return link.partition("?")[0][:MAX_ANSWER_SHOWN_CHARACTERS]
