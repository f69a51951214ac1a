"""What requests say: names in their path, numbers in their query, JSON in their body."""

import json
import math
from typing import Any, NoReturn
from urllib.parse import unquote

from aiohttp import web

from local_endpoint.queue import RequestRefused

# Python gives up near a thousand, in reading or only later in writing.
MAX_LEVELS = 500


def read_json(content: bytes) -> Any:
    """The JSON of a body, which must be UTF-8 and must fit into an answer again.

    Raises:
        RequestRefused: it does not. Python's NaN and Infinity are not JSON either.
    """
    try:
        value = json.loads(content.decode(), parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise RequestRefused(f"the body is not valid JSON: {error}") from None
    if _is_deeper_than(MAX_LEVELS, value):
        raise _too_deep()
    return value


def check_size(size: int, max_bytes: int) -> None:
    """
    Raises:
        HTTPRequestEntityTooLarge: a body of this size is over the limit.
    """
    if size > max_bytes:
        message = f"the request has {size} bytes; at most {max_bytes} are allowed"
        raise web.HTTPRequestEntityTooLarge(max_bytes, size, text=message)


def read_integer(name: str, text: str, minimum: int, maximum: int, unit: str = "") -> int:
    """A number of a query, for example `batch_size`.

    Raises:
        RequestRefused: it is none, or outside its limits.
    """
    is_short = len(text) <= len(str(maximum))  # Python reads no number of thousands of digits
    if not (text.isdecimal() and is_short and minimum <= int(text) <= maximum):
        raise RequestRefused(
            f"{name}: must be an integer from {minimum} to {maximum}{unit}; got {text[:40]!r}"
        )
    return int(text)


def route_of(request: web.Request) -> str:
    """The route's name, as in the URL; "" where there is none."""
    return "".join(_path_parts(request)[3:4])


def path_names(request: web.Request) -> list[str]:
    """The ids in `/v2/<endpoint>/<route>/<id>...`, one or two of them."""
    return _path_parts(request)[4:]


def _path_parts(request: web.Request) -> list[str]:
    # Split first: an id may have a "/" or "&" that is percent-encoded. The SDK appends
    # "&job_in_progress=0" even to an address without "?": the part ends there.
    return [unquote(part.partition("&")[0]) for part in request.rel_url.raw_path.split("/")]


def _is_deeper_than(levels: int, value: Any) -> bool:
    level = [value]
    for _ in range(levels):
        level = [inner for outer in level for inner in _inside(outer)]
    return bool(level)


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep() -> RequestRefused:
    return RequestRefused(f"the body is nested too deeply; at most {MAX_LEVELS} levels are allowed")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number
