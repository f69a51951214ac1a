"""A request's `path` of an adapter becomes a whole, checked file on disk.

All of it runs on the loop of the connections' thread. A file that several jobs wait for is fetched
once, and no longer than one of them waits.
"""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import connections
from sdxl_worker.inputs.adapter_cache import AdapterFile
from sdxl_worker.inputs.adapter_download import Progress, cached_or_fetched
from sdxl_worker.inputs.adapter_sources import LocalFile, RemoteFile, SourceError, find_source
from sdxl_worker.safetensors_header import NotSafetensorsError, read_header
from sdxl_worker.settings import Settings

MAX_FILES = 16
PROGRESS_SECONDS = 0.2
HASH_BYTES = 4 * 1024**2


@dataclass(eq=False)
class _Shared:
    """What one or several jobs wait for."""

    task: asyncio.Task[AdapterFile]
    progress: Progress
    waiting: int = 0


# By what is asked for. Only the connections' loop uses it.
_shared: dict[tuple[LocalFile | RemoteFile, Settings], _Shared] = {}
# Of files in LORA_DIR, by path, size and time.
_hashes: dict[tuple[Path, int, int], str] = {}


async def fetch_adapters(
    paths: Mapping[str, str], settings: Settings, on_bytes: Callable[[int, int | None], None]
) -> dict[str, AdapterFile]:
    """
    Args:
        paths: by the field that names it, "loras[0].path".
        on_bytes: called on this loop while files come, with how many bytes have come and how many
            there are in all, None until that is known. Not called if nothing has to be fetched.

    Returns:
        The files, by field. They stay on the disk as long as these objects live.

    Raises:
        RequestError: one of them cannot be had, or is no safetensors file.
    """
    if len(paths) > MAX_FILES:
        raise RequestError(
            f"{list(paths)[MAX_FILES]}: a job may name {MAX_FILES} files at most; send fewer"
        )
    loop = asyncio.get_running_loop()
    is_waiting = True

    def tell(done: int, total: int | None) -> None:
        if is_waiting:
            on_bytes(done, total)

    try:
        return await connections.away(
            _fetch_all(paths, settings, lambda *told: loop.call_soon_threadsafe(tell, *told))
        )
    finally:
        is_waiting = False


async def _fetch_all(
    paths: Mapping[str, str], settings: Settings, tell: Callable[..., Any]
) -> dict[str, AdapterFile]:
    sources, problems = {}, []
    for name, path in paths.items():
        try:
            sources[name] = await asyncio.to_thread(find_source, path, settings)
        except SourceError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise RequestError("\n".join(problems))
    joined = {source: _join(source, settings) for source in set(sources.values())}
    progress = [shared.progress for shared in joined.values()]
    telling = asyncio.create_task(_tell_at_times(progress, tell))
    try:
        files = await asyncio.gather(
            *(_awaited(name, joined[source]) for name, source in sources.items())
        )
    finally:
        telling.cancel()
        for shared in joined.values():
            _leave(shared)
    _tell(progress, tell)
    return dict(zip(sources, files, strict=True))


async def _awaited(name: str, shared: _Shared) -> AdapterFile:
    try:
        return await asyncio.shield(shared.task)
    except SourceError as error:
        raise RequestError(f"{name}: {error}") from None
    except NotSafetensorsError as error:
        raise RequestError(f"{name}: the file is {error}") from None


def _join(source: LocalFile | RemoteFile, settings: Settings) -> _Shared:
    key = source, settings
    if key not in _shared:
        progress = Progress()
        shared = _Shared(asyncio.create_task(_obtained(source, settings, progress)), progress)

        def ended(task: asyncio.Task[AdapterFile]) -> None:
            progress.total_bytes = progress.done_bytes
            if _shared.get(key) is shared:
                del _shared[key]
            if not task.cancelled():
                task.exception()  # known to whoever still waits; to be logged for nobody else

        shared.task.add_done_callback(ended)
        _shared[key] = shared
    _shared[key].waiting += 1
    return _shared[key]


def _leave(shared: _Shared) -> None:
    shared.waiting -= 1
    if not shared.waiting and not shared.task.done():
        shared.task.cancel()
        # Whoever comes now must not join what ends.
        for key in [key for key, one in _shared.items() if one is shared]:
            del _shared[key]


async def _tell_at_times(progress: Collection[Progress], tell: Callable[..., Any]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        _tell(progress, tell)


def _tell(progress: Collection[Progress], tell: Callable[..., Any]) -> None:
    done = sum(one.done_bytes for one in progress)
    totals = [one.total_bytes for one in progress]
    known = [total for total in totals if total is not None]
    if done:
        tell(done, sum(known) if len(known) == len(totals) else None)


async def _obtained(
    source: LocalFile | RemoteFile, settings: Settings, progress: Progress
) -> AdapterFile:
    if isinstance(source, RemoteFile):
        return await cached_or_fetched(source, settings, progress)
    progress.total_bytes = 0
    stopped = threading.Event()
    try:
        return await asyncio.to_thread(_read, source, stopped)
    except OSError:
        raise SourceError("the worker cannot read this file; its owner has to correct it") from None
    finally:
        stopped.set()


def _read(source: LocalFile, stopped: threading.Event) -> AdapterFile:
    header = read_header(source.path)
    about = source.path.stat()
    key = source.path, about.st_size, about.st_mtime_ns
    if key not in _hashes:
        digest = hashlib.sha256()
        with source.path.open("rb") as file:
            while data := file.read(HASH_BYTES):
                if stopped.is_set():
                    raise InterruptedError
                digest.update(data)
        _hashes[key] = digest.hexdigest()
    return AdapterFile(source.path, _hashes[key], source.name, header)
