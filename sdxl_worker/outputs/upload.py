"""Pictures on their way to storage: to presigned addresses, or into a bucket.

A picture that cannot be uploaded is not lost: the failure is returned, and what becomes of the
picture is the caller's to decide.
"""

import asyncio
import io
import itertools
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import connections
from sdxl_worker.outputs.bucket import Bucket, bucket_of_job, bucket_of_owner
from sdxl_worker.request import Request
from sdxl_worker.settings import Settings
from sdxl_worker.wording import without_secrets

if TYPE_CHECKING:
    from aiohttp import ClientSession

log = logging.getLogger(__name__)

# For all pictures of a job, all tries and pauses included.
UPLOAD_SECONDS = 60.0
TRIES = 3
TRY_SECONDS = 20.0
# Where the storage may never ask for what is to be sent.
ASKED_TRY_SECONDS = 8.0
FIRST_PAUSE_SECONDS = 1.0
# More at once would share the same uplink, and keep one another from ending in time.
SIDE_BY_SIDE = 4
CHECK_SECONDS = 20.0
# What passes; of all other answers, the next would be the same.
PASSING = (408, 425, 429)
# Of an answer, for the error's code.
MAX_ANSWER_BYTES = 16 * 1024
# What is told of the codes of https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
ADVICE = {
    "NoSuchBucket": "there is no such bucket: correct its name (BUCKET_NAME, bucketName)",
    "InvalidAccessKeyId": "correct the access key's id",
    "SignatureDoesNotMatch": "correct the secret access key, or the region (BUCKET_REGION, region)",
    "AuthorizationHeaderMalformed": "correct the region (BUCKET_REGION, region)",
    "AccessDenied": "the access key needs the right to do this in this bucket",
    "RequestTimeTooSkewed": "the clock of the worker's machine is wrong",
}


@dataclass(frozen=True)
class UploadFailure:
    cause: str
    """For the caller: what is wrong and what to do. No address, no key."""


@dataclass(frozen=True, repr=False)
class PutUrls:
    """Addresses that whoever sent the job signed, one for each picture."""

    urls: tuple[str, ...]
    private_allowed: bool


Destination = Bucket | PutUrls


class _PassingError(Exception):
    """It may be well at the next try."""


class _FinalError(Exception):
    """It would be the same at the next try."""


def destination(job: Mapping[str, Any], request: Request, settings: Settings) -> Destination | None:
    """Where the pictures of a job go; None: into its answer.

    Raises:
        RequestError: the job's `s3Config`, or an address of `upload_urls`, is wrong.
    """
    private_allowed = connections.are_private_allowed()
    if request.upload_urls is not None:
        for i, url in enumerate(request.upload_urls):
            try:
                connections.url(url)
                _headers_of_put(url, "")
            except ValueError:
                raise RequestError(
                    f"upload_urls[{i}]: not an address that can be used: correct it"
                ) from None
            if not private_allowed and connections.is_private(url):
                raise RequestError(f"upload_urls[{i}]: {connections.PUBLIC_ONLY}")
        return PutUrls(tuple(request.upload_urls), private_allowed)
    if job.get("s3Config"):
        return bucket_of_job(job["s3Config"], private_allowed=private_allowed)
    return bucket_of_owner(settings)


async def upload(
    pictures: Sequence[bytes],
    media_type: str,
    extension: str,
    destination: Destination,
    job_id: str,
    *,
    outcomes: list[str | UploadFailure] | None = None,
) -> list[str | UploadFailure]:
    """Upload the pictures of a job side by side, within `UPLOAD_SECONDS`.

    Args:
        pictures: files, all of the same kind.
        media_type: "image/png".
        extension: "png".
        outcomes: one for each picture, replaced by the true one as soon as that is known: what
            remains where this is cancelled.

    Returns:
        For each picture its link, or why there is none.
    """
    outcomes = outcomes or [UploadFailure("not tried")] * len(pictures)
    await connections.away(
        _upload_all(pictures, media_type, extension, destination, job_id, outcomes)
    )
    return outcomes


async def _upload_all(
    pictures: Sequence[bytes],
    media_type: str,
    extension: str,
    destination: Destination,
    job_id: str,
    outcomes: list[str | UploadFailure],
) -> None:
    ends_at = asyncio.get_running_loop().time() + UPLOAD_SECONDS
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def upload_one(index: int, data: bytes) -> None:
        name = f"{_folder(job_id)}/{secrets.token_hex(4)}.{extension}"
        cause = f"the storage did not take it within {UPLOAD_SECONDS:g} seconds in all"
        try:
            async with asyncio.timeout_at(ends_at), places:
                for tries in itertools.count(1):
                    try:
                        outcomes[index] = await _put(
                            session, destination, index, name, data, media_type, tries
                        )
                        return
                    except _PassingError as error:
                        cause = f"{error} (tried {tries} times)"
                        if tries == TRIES:
                            break
                    await asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (tries - 1))
        except TimeoutError:
            pass
        except _FinalError as error:
            cause = str(error)
        except Exception as error:  # whatever it is, the other pictures must not be lost by it
            log.exception("uploading failed", extra={"job_id": job_id})
            cause = f"the worker failed at uploading it ({type(error).__name__})"
        log.warning("picture %d not uploaded: %s", index, cause, extra={"job_id": job_id})
        outcomes[index] = UploadFailure(cause)

    async with connections.session(private_allowed=destination.private_allowed) as session:
        await asyncio.gather(*(upload_one(i, data) for i, data in enumerate(pictures)))


def _folder(job_id: str) -> str:
    """An id may be any text."""
    return re.sub(r"[^\w.-]", "_", job_id, flags=re.ASCII)[:100].lstrip(".") or "job"


async def _put(
    session: "ClientSession",
    destination: Destination,
    index: int,
    name: str,
    data: bytes,
    media_type: str,
    tries: int,
) -> str:
    """The link of the picture, once it is stored."""
    # A storage that refuses a picture unread closes the connection, and its answer is lost at
    # times, unless the picture waits to be asked for. Some never ask: so it does not at first.
    asked_for = tries == 2
    if isinstance(destination, Bucket):
        signed = destination.signed("PUT", name, data, media_type)
        await _send(session, "PUT", *signed, data, asked_for=asked_for)
        return destination.link(name)
    url = destination.urls[index]
    headers = _headers_of_put(url, media_type)
    await _send(session, "PUT", url, headers, data, asked_for=asked_for)
    return without_secrets(url)


def _headers_of_put(url: str, media_type: str) -> dict[str, str]:
    """Those that a presigned address asks for. Where headers are signed, others are refused."""
    query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    headers = {}
    signed = next((v for name, v in query.items() if name.endswith("signedheaders")), "")
    is_signed = any(name.endswith("signature") for name in query)
    if not is_signed or "content-type" in signed.lower().split(";"):
        headers["Content-Type"] = media_type
    if (urlsplit(url).hostname or "").lower().endswith(".blob.core.windows.net"):
        headers["x-ms-blob-type"] = "BlockBlob"
    return headers


async def _send(
    session: "ClientSession",
    method: str,
    url: str,
    headers: Mapping[str, str],
    data: bytes = b"",
    *,
    asked_for: bool = False,
) -> bytes:
    """One try of a request.

    Args:
        asked_for: send the data once the server asks for them.

    Returns:
        The beginning of the answer's body.

    Raises:
        _PassingError, _FinalError: with the cause.
    """
    seconds = min(ASKED_TRY_SECONDS, TRY_SECONDS) if asked_for else TRY_SECONDS
    try:
        async with (
            asyncio.timeout(seconds),
            session.request(
                method,
                connections.url(url),
                # An empty body has no type, and a GET none at all.
                data=io.BytesIO(data) if data else None,
                headers=headers,
                skip_auto_headers=("Content-Type",),
                allow_redirects=False,
                expect100=asked_for,
            ) as response,
        ):
            status = response.status
            answer = await response.content.read(MAX_ANSWER_BYTES)
    except TimeoutError:
        raise _PassingError(f"the storage took longer than {seconds:g} seconds") from None
    except connections.troubles() as error:
        kind = _PassingError if connections.may_pass(error) else _FinalError
        raise kind(f"the storage: {connections.cause(error)}") from None
    if status < 300:
        return answer
    told = f"the storage answered {connections.status_words(status)}"
    if status < 400:
        raise _FinalError(
            f"{told}, a redirect, which is not followed: use the address, or the region, that it "
            "redirects to"
        )
    # Only a name is taken of a stranger's answer.
    found = re.search(rb"<Code>(\w{1,40})</Code>", answer)
    code = found[1].decode("ascii", "replace") if found else ""
    told += f" ({code})" if code else ""
    told += f": {ADVICE[code]}" if code in ADVICE else ""
    raise (_PassingError if status >= 500 or status in PASSING else _FinalError)(told)


async def check_storage(destination: Destination) -> str:
    """Put, get and delete a small object, in a bucket; where links can be read by it, through one.

    Returns:
        "ok", or which of them failed and why.
    """
    if not isinstance(destination, Bucket):
        return "not checked: upload_urls take one picture each"
    return await connections.away(_check(destination))


async def _check(bucket: Bucket) -> str:
    name, data, step = f"check/{secrets.token_hex(4)}.txt", secrets.token_hex(8).encode(), "put"
    try:
        async with (
            asyncio.timeout(CHECK_SECONDS),
            connections.session(private_allowed=bucket.private_allowed) as session,
        ):
            await _send(session, "PUT", *bucket.signed("PUT", name, data, "text/plain"), data)
            step = "get"
            readable = bucket.has_signed_links or bucket.public_url
            asked = (bucket.link(name), {}) if readable else bucket.signed("GET", name)
            if await _send(session, "GET", *asked) != data:
                return "get: the storage answered with something else than was put there"
            step = "delete"
            await _send(session, "DELETE", *bucket.signed("DELETE", name))
    except TimeoutError:
        return f"{step}: the storage took longer than {CHECK_SECONDS:g} seconds in all"
    except (_PassingError, _FinalError) as error:
        return f"{step}: {error}"
    return "ok"
