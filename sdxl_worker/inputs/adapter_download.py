"""One file from its server into the cache: its header is checked before its body is fetched."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sdxl_worker.inputs import adapter_hosts
from sdxl_worker.inputs.adapter_cache import (
    AdapterFile,
    Cache,
    Entry,
    Part,
    disk_trouble,
    open_cache,
)
from sdxl_worker.inputs.adapter_hosts import BrokenOffError, UnreachableError
from sdxl_worker.inputs.adapter_sources import RemoteFile, SourceError, chosen, token_for
from sdxl_worker.safetensors_header import (
    PROBE_BYTES,
    NotSafetensorsError,
    header_end,
    parse_header,
)
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    from aiohttp import ClientResponse

log = logging.getLogger(__name__)
T = TypeVar("T")

# Rank 256 for every layer has 1.8 GB, and twice that in fp32; whole checkpoints are over it.
MAX_ADAPTER_BYTES = 4 * 1024**3
# For a file, redirects and a second try included: 800 MB, the largest in common use, at 1.3 MB/s.
DOWNLOAD_SECONDS = 600.0
# How long an address that may come to have another file is taken to have the same.
FRESH_SECONDS = 300.0
# What is gathered before it is written: a thread for each chunk would cost more than it saves.
WRITE_BYTES = 1024**2


@dataclass(eq=False)
class Progress:
    done_bytes: int = 0
    total_bytes: int | None = None
    """None: not known yet."""


async def cached_or_fetched(
    source: RemoteFile, settings: Settings, progress: Progress
) -> AdapterFile:
    """
    Raises:
        SourceError: it cannot be had.
        NotSafetensorsError: it is another file.
    """
    token = token_for(source.address, settings) or ""
    key = hashlib.sha256(f"{source.address}\n{token}".encode()).hexdigest()
    cache = await _on_disk(open_cache, settings)
    found = await _on_disk(cache.find, key)
    if found is not None:
        file, entry = found
        age_seconds = time.time() - entry.checked_at
        if source.is_pinned or 0 <= age_seconds < FRESH_SECONDS:
            return file
    try:
        file, etag = await _fetched(source, found, cache, settings, progress)
    except UnreachableError as error:
        if found is None:
            raise
        file, etag = found[0], found[1].etag
        log.warning("%s: %s; the file in the cache is used", file.name, error)
    await _on_disk(cache.note, key, Entry(file.sha256, file.name, etag, time.time()))
    return file


async def _fetched(
    source: RemoteFile,
    found: tuple[AdapterFile, Entry] | None,
    cache: Cache,
    settings: Settings,
    progress: Progress,
) -> tuple[AdapterFile, str | None]:
    """The file, and the server's mark of this version of it."""
    began = time.monotonic()
    receiver = _Receiver(cache, settings, progress, found)
    try:
        async with asyncio.timeout(DOWNLOAD_SECONDS):
            if source.listing:
                listing = await adapter_hosts.listing(source.address, settings)
                source = chosen(source, listing, settings)
            try:
                file = await receiver.received(source)
            except BrokenOffError as error:
                if found is not None:
                    raise
                log.info("%s: %s; one more try", source.name, error)
                file = await receiver.received(source)
    except TimeoutError:
        raise UnreachableError(
            f"its server did not send it within {DOWNLOAD_SECONDS:g} seconds; use a faster one"
        ) from None
    finally:
        receiver.discard()
    if progress.done_bytes:
        took = time.monotonic() - began
        log.info("%s: %.1f MB in %.1f s", file.name, file.header.file_bytes / 1e6, took)
    return file, receiver.etag


class _Receiver:
    """Of one file, in one or more tries."""

    def __init__(
        self,
        cache: Cache,
        settings: Settings,
        progress: Progress,
        found: tuple[AdapterFile, Entry] | None,
    ) -> None:
        self.cache = cache
        self.settings = settings
        self.progress = progress
        self.found = found
        self.part: Part | None = None
        self.etag: str | None = None

    async def received(self, source: RemoteFile) -> AdapterFile:
        """Goes on where the last try ended, if the server can."""
        headers = {"Accept-Encoding": "identity"}
        if self.part is not None and self.etag and not self.etag.startswith("W/"):
            headers |= {"Range": f"bytes={self.part.written_bytes}-", "If-Range": self.etag}
        elif self.found is not None and self.found[1].etag:
            headers["If-None-Match"] = self.found[1].etag
        async with adapter_hosts.answer(source.address, headers, self.settings) as response:
            if response.status == 304 and self.found is not None:
                self.etag = self.found[1].etag
                return self.found[0]
            if response.status == 206 and self.part is not None:
                _check_range(response, self.part)
                part, first = self.part, b""
            else:
                self.discard()
                self.etag = response.headers.get("ETag")
                part, first = await self._begun(response)
            await self._receive(response, part, first)
        return await _on_disk(part.keep, source.name)

    def discard(self) -> None:
        """What was not kept."""
        if self.part is not None:
            self.part.discard()
            self.part = None

    async def _begun(self, response: "ClientResponse") -> tuple[Part, bytes]:
        """A part, once the header is found well, and the bytes that have come until then."""
        is_plain = response.headers.get("Content-Encoding", "identity") == "identity"
        size = response.content_length if is_plain else None
        first = await _at_least(PROBE_BYTES, b"", response)
        end = header_end(first, size)
        first = await _at_least(end, first, response)
        header = parse_header(first[:end], size)
        limit = min(MAX_ADAPTER_BYTES, self.cache.budget_bytes)
        if header.file_bytes > limit:
            raise SourceError(
                f"it has {header.file_bytes / 1e9:.2f} GB, and this worker takes at most "
                f"{limit / 1e9:.2f} GB; use a smaller one, or ask its owner to raise LORA_CACHE_GB"
            )
        self.progress.total_bytes = header.file_bytes
        await _on_disk(self.cache.make_room, header.file_bytes)
        try:
            self.part = Part(self.cache.folder, header)
        except OSError as error:
            raise disk_trouble(error) from None
        return self.part, first

    async def _receive(self, response: "ClientResponse", part: Part, first: bytes) -> None:
        size, gathered = part.header.file_bytes, bytearray(first)
        while chunk := await adapter_hosts.received(response):
            gathered += chunk
            self.progress.done_bytes = part.written_bytes + len(gathered)
            if self.progress.done_bytes > size:
                break
            if len(gathered) >= WRITE_BYTES:
                await _on_disk(part.write, bytes(gathered))
                gathered.clear()
        came_bytes = part.written_bytes + len(gathered)
        if came_bytes > size:
            raise NotSafetensorsError("damaged: more follows its last tensor; send another")
        if came_bytes < size:
            raise NotSafetensorsError(
                f"cut off: its server sent {came_bytes} of {size} bytes; send the whole file"
            )
        await _on_disk(part.write, bytes(gathered))
        self.progress.done_bytes = size


def _check_range(response: "ClientResponse", part: Part) -> None:
    told = response.headers.get("Content-Range")
    size = part.header.file_bytes
    if told != f"bytes {part.written_bytes}-{size - 1}/{size}":
        raise SourceError("its server sends another part than it was asked for; use another server")


async def _at_least(size: int, first: bytes, response: "ClientResponse") -> bytes:
    """Fewer only at the body's end."""
    gathered = bytearray(first)
    while len(gathered) < size and (chunk := await adapter_hosts.received(response)):
        gathered += chunk
    return bytes(gathered)


async def _on_disk(function: Callable[..., T], *args: Any) -> T:
    """In a thread.

    Raises:
        SourceError: in place of errors of the disk.
    """
    try:
        return await asyncio.to_thread(function, *args)
    except OSError as error:
        raise disk_trouble(error) from None
