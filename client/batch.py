"""Many jobs from a file, some in flight at a time; what is done is not done again.

A picture's name comes from its input, so what is there shows what is done. A journal in the same
folder has the ids of jobs in flight, which the next call waits for, and the errors. Each of its
lines is written at once, and the last may be cut off.
"""

import asyncio
import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.draw import NOT_FOUND, Delivery, JobFailedError, output_of, run_job, save_pictures
from client.endpoint import Endpoint, EndpointError, WrongEndpointError
from client.options import (
    Field,
    UsageError,
    check,
    from_row,
    input_of,
    own_names,
    with_files,
    with_options_named,
)
from client.picture_files import PART_PREFIX, PART_SUFFIX, SUFFIXES, slug
from client.progress_bar import Display

JOURNAL = ".sdxl-batch.jsonl"
HASH_DIGITS = 10
SECONDS_OF_A_WRITE = 600


@dataclass(frozen=True)
class Item:
    """One job of a batch."""

    name: str
    job_input: dict[str, Any]
    """Paths of pictures are still paths."""

    @property
    def count(self) -> int:
        return int(self.job_input.get("num_images", 1))

    def stem(self, i: int, count: int) -> str:
        return self.name if count == 1 else f"{self.name}-{i + 1}"


def read_items(
    text: str, kind: str, base: Mapping[str, Any], fields: Mapping[str, Field]
) -> tuple[list[Item], int]:
    """The jobs that a file asks for, and how many were there twice.

    Args:
        kind: ".jsonl" (an input on each line), ".csv" (columns are fields), or else a prompt on
            each line.
        base: what holds for each job that does not say otherwise.

    Raises:
        UsageError: there are mistakes in it; the message has a line for each.
    """
    items: dict[str, Item] = {}
    mistakes: list[str] = []
    count = 0
    for number, read in _rows(text, kind, fields):
        try:
            job_input = {**base, **own_names(read(), fields)}
            sent = with_files(job_input, fields)
            check(sent, fields)
        except UsageError as error:
            mistakes += [f"line {number}: {line}" for line in str(error).splitlines()]
            continue
        count += 1
        canonical = json.dumps(sent, sort_keys=True).encode()
        digits = hashlib.sha256(canonical).hexdigest()[:HASH_DIGITS]
        name = f"{slug(str(sent.get('prompt') or 'picture'))}-{digits}"
        items.setdefault(name, Item(name, job_input))
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return list(items.values()), count - len(items)


def _rows(text: str, kind: str, fields: Mapping[str, Field]) -> Iterator[tuple[int, Any]]:
    """The number of each line, and a function that reads it."""
    if kind == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in _rows_of(reader):
            if None in row:
                raise UsageError(f"line {reader.line_num}: has more cells than there are columns")
            cells = {name.strip(): cell or "" for name, cell in row.items()}
            names = own_names({name: name for name in cells}, fields)
            renamed = {name: cells[alias] for name, alias in names.items()}
            yield reader.line_num, lambda renamed=renamed: from_row(renamed, fields)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and kind == ".jsonl":
            yield number, lambda line=line: input_of(line)
        elif line.strip():
            yield number, lambda line=line: {"prompt": line.strip()}


def _rows_of(reader: "csv.DictReader[str]") -> Iterator[dict[str | Any, str | Any]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UsageError(f"line {reader.reader.line_num}: cannot be read: {error}") from None


class Journal:
    """What is known of the jobs in a folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self._last: dict[str, dict[str, Any]] = {}
        content = self._path.read_bytes() if self._path.exists() else b""
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                self._last[entry["name"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # cut off
        if content and not content.endswith(b"\n"):
            self._append(b"\n")

    def last(self, name: str) -> dict[str, Any]:
        return self._last.get(name, {})

    def note(self, name: str, event: str, **more: Any) -> None:
        entry = {"name": name, "event": event, **more}
        self._last[name] = entry
        self._append(json.dumps(entry).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """
    Raises:
        UsageError: another batch writes to the folder.
    """
    with (folder / JOURNAL).open("ab") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another `sdxl batch` is at work in {folder}") from None
        for part in folder.glob(f"{PART_PREFIX}*{PART_SUFFIX}"):
            if time.time() - part.stat().st_mtime > SECONDS_OF_A_WRITE:
                part.unlink(missing_ok=True)  # of a process that was killed
        yield


@dataclass(kw_only=True)
class Outcome:
    """What a batch came to."""

    there_before: int = 0
    files: list[Path] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    maps: list[Path] = field(default_factory=list)
    nsfw: dict[str, bool] = field(default_factory=dict)
    """As of `Delivered`."""
    failed: dict[str, str] = field(default_factory=dict)
    """Errors by the jobs' names."""


class Batch:
    """The jobs of one call."""

    def __init__(
        self,
        endpoint: Endpoint,
        folder: Path,
        fields: Mapping[str, Field],
        display: Display,
        *,
        timeout_seconds: float | None = None,
        links: bool = False,
        as_sent: bool = False,
    ) -> None:
        self._endpoint = endpoint
        self._folder = folder
        self._fields = fields
        self._display = display
        self._timeout_seconds = timeout_seconds
        self._links = links
        self._as_sent = as_sent
        self._journal = Journal(folder)
        self.outcome = Outcome()

    def is_done(self, item: Item) -> bool:
        """Whether its pictures are there, or it was delivered as links."""
        if all(self._has(item.stem(i, item.count)) for i in range(item.count)):
            return True
        last = self._journal.last(item.name)
        return last.get("event") == "done" and all(
            (self._folder / name).is_file() for name in last.get("files", ())
        )

    def _has(self, stem: str) -> bool:
        return any((self._folder / f"{stem}{suffix}").is_file() for suffix in SUFFIXES.values())

    async def run(self, items: Sequence[Item], jobs: int) -> Outcome:
        """Do what is not done, with so many jobs in flight.

        Raises:
            WrongEndpointError: no job would get through.
            OSError: pictures cannot be written.
        """
        left = [item for item in items if not self.is_done(item)]
        waiting = iter(left)
        done = self.outcome.there_before = len(items) - len(left)
        if done:
            self._display.note(f"{done} of {len(items)} are there already.")
        self._display.total(done, len(items))

        async def work() -> None:
            nonlocal done
            for item in waiting:
                await self._do(item)
                done += 1
                self._display.total(done, len(items))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(jobs):
                    group.create_task(work())
        except* (WrongEndpointError, OSError) as errors:
            raise errors.exceptions[0] from None
        return self.outcome

    async def _do(self, item: Item) -> None:
        try:
            job_input = with_files(item.job_input, self._fields)
            answer = await self._answer(item, job_input)
            output = output_of(answer)
            delivery = Delivery(
                place=lambda i, n, suffix, _: self._folder / f"{item.stem(i, n)}{suffix}",
                overwrite=True,  # the name is the input's: what is there is half done
                links=self._links,
                as_sent=self._as_sent,
            )
            delivered = await save_pictures(self._endpoint, output, job_input, delivery)
        except WrongEndpointError:
            raise
        except (EndpointError, JobFailedError, UsageError) as error:
            told = with_options_named(str(error), self._fields)
            self._journal.note(item.name, "failed", error=told)
            self.outcome.failed[item.name] = told
            self._display.say(f"{item.name}: {told}")
            return
        self._journal.note(item.name, "done", files=[path.name for path in delivered.files])
        self.outcome.files.extend(delivered.files)
        self.outcome.links.extend(delivered.links)
        self.outcome.maps.extend(delivered.maps)
        self.outcome.nsfw.update(delivered.nsfw)
        for line in delivered.flagged:
            self._display.say(line)
        if output.get("warning"):
            self._display.say(f"{item.name}: {output['warning']}")

    async def _answer(self, item: Item, job_input: Mapping[str, Any]) -> dict[str, Any]:
        """Of the job that an earlier call sent, if there is one, or of a new one."""
        last = self._journal.last(item.name)
        if last.get("event") == "sent" and last.get("endpoint") == self._endpoint.address.url:
            try:
                answer = await self._run(item, job_input, str(last.get("job")))
            except JobFailedError as error:
                if error.status != NOT_FOUND:
                    raise
            else:
                if answer.get("status") == "COMPLETED":
                    return answer
        elif last.get("event") == "sending":
            self._display.say(
                f"{item.name}: an earlier call ended while it sent this job; it is sent again, "
                "and may be drawn twice"
            )
        self._journal.note(item.name, "sending")
        return await self._run(item, job_input, None)

    async def _run(
        self, item: Item, job_input: Mapping[str, Any], job_id: str | None
    ) -> dict[str, Any]:
        return await run_job(
            self._endpoint,
            job_input,
            self._display,
            str(job_input.get("prompt") or item.name),
            timeout_seconds=self._timeout_seconds,
            job_id=job_id,
            on_taken=lambda new_id: self._journal.note(
                item.name, "sent", job=new_id, endpoint=self._endpoint.address.url
            ),
        )
