"""One job: sent, watched, its pictures saved; cancelled where nobody waits for it."""

import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import picture_files
from client.endpoint import (
    CANCEL_SECONDS,
    ENDED,
    Endpoint,
    EndpointError,
    NotThereError,
    UnknownFateError,
)
from client.picture_files import MAX_SEED, PictureError
from client.progress_bar import Display, JobProgress

FIRST_POLL_SECONDS = 0.2
LONGEST_POLL_SECONDS = 1.0
NOT_FOUND = "NOT_FOUND"
MAP_SUFFIX = ".png"


class JobFailedError(Exception):
    """The job gave no pictures. The message is the worker's, or says what became of the job."""

    def __init__(self, message: str, status: str = "FAILED") -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What becomes of a job's pictures."""

    place: Callable[[int, int, str, int], Path]
    """Of picture i of n, with this suffix and seed: where it is saved."""
    overwrite: bool = False
    links: bool = False
    """Links stay links, and are not downloaded."""
    as_sent: bool = False
    """Files are not completed with the prompts."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """What was saved of a job."""

    files: list[Path]
    links: list[str]
    """Those that stayed links."""
    maps: list[Path]
    """Of `controlnet`, where they were asked for."""
    nsfw: dict[str, bool]
    """By file or link, whether the worker's safety checker flagged it; empty where it has none."""

    @property
    def flagged(self) -> list[str]:
        """What to tell of those that were flagged."""
        return [
            f"{name}: flagged by the worker's safety checker (nsfw)"
            for name, is_flagged in self.nsfw.items()
            if is_flagged
        ]


async def run_job(
    endpoint: Endpoint,
    job_input: Mapping[str, Any],
    display: Display,
    label: str = "",
    *,
    timeout_seconds: float | None = None,
    job_id: str | None = None,
    on_taken: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Send a job, wait until it has ended and return its last status.

    Args:
        job_id: of one that was sent before, which is only waited for.
        on_taken: called with the id, as soon as it is known.

    Raises:
        EndpointError: the endpoint did not take it, or is not to be reached.
        JobFailedError: it took longer than `timeout_seconds`, and was cancelled.
    """
    taken = job_id
    progress = JobProgress(label)

    def take(new_id: str) -> None:
        nonlocal taken
        taken = new_id
        on_taken(new_id)

    display.add(progress)
    try:
        async with asyncio.timeout(timeout_seconds):
            if taken is None:
                taken = await endpoint.run(dict(job_input), take)
            return await _follow(endpoint, taken, progress, display)
    except TimeoutError:
        display.say(await _cancelled(endpoint, taken))
        raise JobFailedError(
            f"not done after {timeout_seconds:g} s (--timeout)", "TIMED_OUT"
        ) from None
    except asyncio.CancelledError:
        display.say(await _cancelled(endpoint, taken))
        raise
    except UnknownFateError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            display.say(str(error))
            raise asyncio.CancelledError from None
        raise
    except NotThereError as error:
        if taken is None:
            raise
        raise JobFailedError(f"the endpoint no longer knows job {taken}", NOT_FOUND) from error
    except EndpointError as error:
        if taken is not None:
            error.args = (f"{error}; job {taken} may still run",)
        raise
    finally:
        display.remove(progress)


async def _follow(
    endpoint: Endpoint, job_id: str, progress: JobProgress, display: Display
) -> dict[str, Any]:
    pause = FIRST_POLL_SECONDS
    while True:
        answer = await endpoint.status(job_id)
        if answer.get("status") in ENDED:
            return answer
        progress.update(answer)
        display.changed(progress)
        await asyncio.sleep(pause)
        pause = min(1.2 * pause, LONGEST_POLL_SECONDS)


async def _cancelled(endpoint: Endpoint, job_id: str | None) -> str:
    """Cancel a job, and say what became of it."""
    if job_id is None:
        return "No job was taken by the endpoint."
    try:
        async with asyncio.timeout(CANCEL_SECONDS):
            status = await endpoint.cancel(job_id)
    except (EndpointError, TimeoutError) as error:
        reason = str(error) or "no answer in time"
        return f"Job {job_id} could not be cancelled, and may still run: {reason}"
    if status == "CANCELLED":
        return f"Cancelled job {job_id}."
    return f"Job {job_id} had ended before it was cancelled: {status}"


def output_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The output of a job that was completed.

    Raises:
        JobFailedError: it was not, or has none.
    """
    status = str(answer.get("status"))
    if status != "COMPLETED":
        reasons = {
            "CANCELLED": "somebody cancelled the job",
            "TIMED_OUT": "the job took longer than the endpoint's execution timeout",
        }
        raise JobFailedError(
            _readable(answer.get("error")) or reasons.get(status, f"the job is {status}"), status
        )
    output = answer.get("output")
    if not isinstance(output, dict):
        raise JobFailedError(
            "the job is completed, but there is no output: it may have been too large for the "
            "platform, or was made more than 30 minutes ago",
            status,
        )
    if output.get("error"):
        raise JobFailedError(_readable(output["error"]), status)
    return output


def _readable(error: Any) -> str:
    """The SDK tells of a crash of the worker as JSON, with a traceback in it."""
    if isinstance(error, str):
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(error)
            if isinstance(parsed, dict) and "error_message" in parsed:
                kind = str(parsed.get("error_type", "")).removeprefix("<class '").removesuffix("'>")
                return f"the worker failed ({kind}): {parsed['error_message']}"
        return error
    return "" if error is None else json.dumps(error)


async def save_pictures(
    endpoint: Endpoint,
    output: Mapping[str, Any],
    job_input: Mapping[str, Any],
    delivery: Delivery,
) -> Delivered:
    """Save what a job made. Maps go beside the first picture: of "a.png", to "a.map-1.png".

    Raises:
        JobFailedError: there is a picture or a map that is none, or a link's cannot be had.
        OSError: a file cannot be written.
    """
    images = output.get("images") or [output.get("image_url")]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise JobFailedError("the endpoint answered with something else than pictures", "COMPLETED")
    first_seed = output.get("seed")
    files: list[Path] = []
    links: list[str] = []
    names: list[str] = []

    def save(content: bytes, path: Path) -> Path:
        if not delivery.overwrite:
            return picture_files.write_new(content, path)
        picture_files.write(content, path)
        return path

    def refused(what: str, error: Exception) -> JobFailedError:
        saved = "".join(f"\nsaved: {path}" for path in files)
        return JobFailedError(f"what came as {what}: {error}{saved}", "COMPLETED")

    for i, image in enumerate(images):
        is_link = not image.startswith("data:")
        if is_link and delivery.links:
            links.append(image)
            names.append(image)
            continue
        seed = (first_seed + i) % (MAX_SEED + 1) if isinstance(first_seed, int) else i
        try:
            content = await endpoint.download(image) if is_link else _decoded(image)
            suffix = picture_files.suffix_of(content)
            if not delivery.as_sent:
                content = picture_files.completed(content, job_input, seed)
        except (EndpointError, PictureError) as error:
            raise refused(f"picture {i + 1}", error) from None
        files.append(save(content, delivery.place(i, len(images), suffix, seed)))
        names.append(str(files[-1]))
    seed = first_seed if isinstance(first_seed, int) else 0
    first = files[0] if files else delivery.place(0, len(images), MAP_SUFFIX, seed)
    maps: list[Path] = []
    for i, uri in enumerate(_list(output.get("maps")), 1):
        try:
            content = _decoded(str(uri))
            picture_files.suffix_of(content)
        except PictureError as error:
            raise refused(f"map {i}", error) from None
        maps.append(save(content, first.with_name(f"{first.stem}.map-{i}{MAP_SUFFIX}")))
    nsfw = dict(zip(names, map(bool, _list(output.get("nsfw"))), strict=False))
    return Delivered(files=files, links=links, maps=maps, nsfw=nsfw)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _decoded(data_uri: str) -> bytes:
    try:
        return base64.b64decode(data_uri.partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("it is broken base64") from None
