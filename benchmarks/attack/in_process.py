"""Attacks on functions in this process: validation, decoding, LoRAs, closed addresses."""

import contextlib
import functools
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.attack.hostile_adapters import HostileFile
from benchmarks.attack.hostile_addresses import DECOY
from benchmarks.attack.hostile_pictures import HostilePicture
from benchmarks.attack.job_inputs import fuzzed
from benchmarks.attack.tally import Tally, unreadable
from sdxl_worker.errors import RequestError

VALIDATION_MAX_SECONDS = 1.0
# What JPEG may change, on the scale 0 to 255.
DIFFERENCE_MAX = 12

_attempts: list[tuple[str, int]] = []
_watching = False


def attack_validation(
    tally: Tally, parse: Callable[[object], object], *, count: int, seed: int
) -> None:
    """Inputs of all kinds: each becomes a request or one readable message, quickly."""
    random_ = random.Random(seed)  # noqa: S311  not for secrets
    for number in range(count):
        job_input = fuzzed(random_)
        started = time.perf_counter()
        complaint = _outcome(_parsed, parse, job_input)
        seconds = time.perf_counter() - started
        tally.raise_to("slowest_ms", 1000 * seconds)
        if complaint is None and seconds > VALIDATION_MAX_SECONDS:
            complaint = f"took {seconds:.1f} s"
        tally.add(f"input {number}, {job_input!r:.200}", complaint)


def attack_decoding(
    tally: Tally, decode: Callable[[bytes], Image.Image], pictures: Iterable[HostilePicture]
) -> None:
    """Odd files: each becomes the right picture or one readable message."""
    for hostile in pictures:
        tally.add(hostile.name, _outcome(_drawn_on, decode, hostile))


def attack_decoding_of_masks(
    tally: Tally, decode_mask: Callable[[bytes], Image.Image], pictures: Iterable[HostilePicture]
) -> None:
    """Odd files: each becomes a mask in black and white, or one readable message."""
    for hostile in pictures:
        tally.add(f"{hostile.name}, as a mask", _outcome(_repainted, decode_mask, hostile))


def attack_addresses(
    tally: Tally, fetch: Callable[[str], object], addresses: Iterable[str]
) -> None:
    """Addresses that are not public: each is refused, and nothing is connected to.

    Args:
        fetch: or whatever else connects to an address.
    """
    for address in addresses:
        with _no_connections() as attempts:
            complaint = _outcome(_fetched, fetch, address)
        if closed := [host for host, _ in attempts if host != DECOY]:
            complaint = f"a connection to {closed[0]} was opened"
        tally.add(f"{address!r:.100}", complaint)


def attack_adapters(
    tally: Tally,
    put_on: Callable[[HostileFile], object],
    digest: Callable[[], str],
    files: Iterable[HostileFile],
) -> None:
    """Files of LoRAs and embeddings: each is put on and off again, or refused, and all weights are
    afterwards as they were.

    Args:
        digest: of the weights.
    """
    before = digest()
    for hostile in files:
        complaint = _outcome(_put_on, put_on, hostile)
        if digest() != before:
            complaint = "the weights are not as they were"
            before = digest()
        tally.add(hostile.name, complaint)


def _outcome(attempt: Callable[[Any, Any], str | None], attacked: Any, what: Any) -> str | None:
    """The attempt's complaint, if it has one; a refusal has to be readable."""
    try:
        return attempt(attacked, what)
    except RequestError as error:
        return unreadable(str(error))
    except Exception as error:  # whatever it is, no caller should get it
        return f"{type(error).__name__}: {error!s:.200}"


def _parsed(parse: Callable[[object], object], job_input: object) -> None:
    parse(job_input)


def _put_on(put_on: Callable[[HostileFile], object], hostile: HostileFile) -> str | None:
    try:
        put_on(hostile)
    except RequestError as error:
        if hostile.is_taken:
            return f"refused: {error!s:.200}"
        raise
    return "taken" if hostile.is_taken is False else None


def _fetched(fetch: Callable[[str], object], address: str) -> str:
    fetch(address)
    return "something was connected to"


def _drawn_on(decode: Callable[[bytes], Image.Image], hostile: HostilePicture) -> str | None:
    picture = decode(hostile.data)
    if picture.mode != "RGB":
        return f"a picture of mode {picture.mode}"
    if hostile.expected is None:
        return None
    if picture.size != hostile.expected.size:
        return f"a picture of {picture.size}"
    one, other = (np.asarray(which, np.float32) for which in (picture, hostile.expected))
    difference = float(np.abs(one - other).mean())
    return f"another picture, by {difference:.0f}" if difference > DIFFERENCE_MAX else None


def _repainted(decode_mask: Callable[[bytes], Image.Image], hostile: HostilePicture) -> str | None:
    mask = decode_mask(hostile.data)
    if mask.mode != "L" or not set(mask.tobytes()) <= {0, 255}:
        return f"a mask of mode {mask.mode} with other values than black and white"
    if hostile.expected is not None and mask.size != hostile.expected.size:
        return f"a mask of {mask.size}"
    return None


@functools.cache
def _install_hook() -> None:
    """Once: an audit hook cannot be removed."""
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and _watching and isinstance(arguments[1], tuple):
        _attempts.append(arguments[1][:2])
        raise ConnectionRefusedError("nothing may be connected to")


@contextlib.contextmanager
def _no_connections() -> Iterator[list[tuple[str, int]]]:
    """Refuse and note all attempts to connect, in all threads."""
    global _watching
    _install_hook()
    _attempts.clear()
    _watching = True
    try:
        yield _attempts
    finally:
        _watching = False
