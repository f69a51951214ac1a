"""From the body of an HTTP request to what a job has beside its id."""

import asyncio
import base64
import json
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sdxl_worker.errors import RequestError
from sdxl_worker.input_model import check_extent
from sdxl_worker.outputs.size_guard import HTTP_LIMIT_BYTES
from sdxl_worker.wording import shown

# 30 MB at two megabits a second.
READ_TIMEOUT_SECONDS = 120.0
# What a job may have beside its input where no queue hands it out.
BESIDE_INPUT = ("s3Config",)
# Several times what the fields of a request are.
MAX_PARTS = 200
# What stands before each value in JSON, and in prompts: all four are short of half of it.
BEFORE_VALUES = b",[{"
MAX_BEFORE_VALUES = 200_000


class Refusal(Exception):  # noqa: N818 - an answer
    """A request's, in place of a job's. The message tells what to change."""

    def __init__(self, status: int, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


async def read_body(request: Request) -> bytes:
    """
    Raises:
        Refusal: it is over the limit, of which no more is kept, or too slow, or lost.
        ClientDisconnect: its sender is gone.
    """
    headers = request.headers
    if "upgrade" in headers and "upgrade" in headers.get("connection", "").lower():
        # Java's client offers HTTP/2 so; the parser takes all that follows for another protocol's.
        raise Refusal(
            400,
            "a body cannot come with an offer of another protocol (Upgrade); send HTTP/1.1 alone",
        )
    too_large = Refusal(
        413,
        f"the body is over {HTTP_LIMIT_BYTES / 1e6:.0f} MB; send pictures as links (https://...), "
        "or smaller ones",
    )
    told = headers.get("content-length", "")
    # Python reads no number of thousands of digits.
    if told.isdecimal() and (len(told) > 18 or int(told) > HTTP_LIMIT_BYTES):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                if len(body) + len(chunk) > HTTP_LIMIT_BYTES:
                    raise too_large
                body += chunk
    except TimeoutError:
        raise Refusal(
            408, f"the body was not there after {READ_TIMEOUT_SECONDS:.0f} seconds"
        ) from None
    return bytes(body)


def job_of(body: bytes) -> dict[str, Any]:
    """`{"input": {...}}`, as on the queue, or the input's fields themselves.

    Raises:
        Refusal: it is neither.
    """
    sent = read_object(body)
    if "input" not in sent:
        return {"input": sent}
    foreign = [name for name in sent if name not in ("input", *BESIDE_INPUT)]
    if foreign:
        raise Refusal(
            400,
            f"{shown(foreign[0])}: no such field beside input; there may be "
            f"{', '.join(BESIDE_INPUT)}",
        )
    return sent


def read_object(body: bytes) -> dict[str, Any]:
    """
    Raises:
        Refusal: it is no JSON object, or one that no request looks like.
    """
    # Millions of values take seconds to read, in which not even /ping is answered.
    if sum(body.count(sign) for sign in BEFORE_VALUES) > MAX_BEFORE_VALUES:
        raise Refusal(400, "the body has more values in it than any request")
    try:
        value = json.loads(body)
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the body is not valid JSON: {error}") from None
    except ValueError:  # of bytes that are no text, and of numbers that Python does not read
        raise Refusal(
            400, "the body must be JSON in UTF-8, with no number of thousands of digits"
        ) from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object; got {shown(value)}")
    try:
        check_extent(value)  # before it waits for its turn: such objects take many times their text
    except RequestError as error:
        raise Refusal(400, str(error)) from None
    return value


async def read_form_or_object(request: Request, body: bytes) -> dict[str, Any]:
    """A form (`multipart/form-data`) as the object that says the same: texts as they are, files as
    data URIs; of several with one name, and of one that is called `name[]`, a list.

    Raises:
        Refusal: the body is neither a form nor a JSON object.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        return read_object(body)
    # The parser would leave out a part that is cut off without a word.
    if (boundary := options.get(b"boundary")) and b"--%b--" % boundary not in body:
        raise Refusal(400, "the form cannot be read: its end is missing")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    again = Request(request.scope, receive)
    try:
        async with again.form(
            max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=HTTP_LIMIT_BYTES
        ) as form:
            values: dict[str, list[str]] = {}
            for sent_name, value in form.multi_items():
                values.setdefault(sent_name.removesuffix("[]"), []).append(
                    await _data_uri(value) if isinstance(value, UploadFile) else value
                )
            lists = {name.removesuffix("[]") for name in form if name.endswith("[]")}
    except HTTPException as error:
        raise Refusal(400, f"the form cannot be read: {error.detail}") from None
    return {
        name: several if name in lists or len(several) > 1 else several[0]
        for name, several in values.items()
    }


async def _data_uri(file: UploadFile) -> str:
    payload = base64.b64encode(await file.read()).decode("ascii")
    return f"data:{file.content_type or 'application/octet-stream'};base64,{payload}"
