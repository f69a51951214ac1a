"""Downloaded adapters on disk, whole files only, within a budget. Workers may share the folder.

It holds `HASH.safetensors`, files by the SHA-256 of their contents, and `KEY.json`, what an address
gave. A file that is used is locked (flock) as long as its `AdapterFile` lives, and is not removed:
the files of running jobs may go over the budget. What is being written ends with `.part`, and is
locked, too: a killed worker's lock ends with it, so that others see what it left.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sdxl_worker.inputs.adapter_sources import SUFFIX, SourceError
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.safetensors_header import NotSafetensorsError, SafetensorsHeader, read_header
from sdxl_worker.settings import Settings

# Nothing else in the folder is touched: it may be one that its owner keeps files in, too.
FILE = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
ENTRY = re.compile(r"[0-9a-f]{64}\.json")
PART = re.compile(r"adapter-.*\.part")
# Addresses that change with each job, signed ones for example, would gather.
MAX_ENTRIES = 1000
# Between a file's making and its locking.
LEFTOVER_SECONDS = 60


@dataclass(frozen=True)
class Entry:
    """What an address gave."""

    sha256: str
    name: str
    etag: str | None
    checked_at: float
    """When the server was asked last, in seconds since 1970."""


class Part:
    """A file that is being written, by threads: whoever is cancelled discards it meanwhile."""

    def __init__(self, folder: Path, header: SafetensorsHeader) -> None:
        self.header = header
        self.written_bytes = 0
        self._sha256 = hashlib.sha256()
        self._lock = threading.Lock()
        self._descriptor, path = tempfile.mkstemp(".part", "adapter-", folder)
        self._path = Path(path)
        self._is_open = True
        try:
            _locked(self._descriptor, fcntl.LOCK_EX)
            # Its size tells the others what room it will take.
            os.ftruncate(self._descriptor, header.file_bytes)
        except OSError:
            self.discard()
            raise

    def write(self, data: bytes) -> None:
        with self._open():
            view = memoryview(data)
            while view:
                written = os.write(self._descriptor, view)
                self._sha256.update(view[:written])
                self.written_bytes += written
                view = view[written:]

    def keep(self, name: str) -> AdapterFile:
        """From now on it is in the cache, under its hash."""
        with self._open():
            sha256 = self._sha256.hexdigest()
            path = self._path.with_name(sha256 + SUFFIX)
            there = _leased(path)
            if there is not None:
                if os.fstat(there).st_size == self.written_bytes:
                    # Whoever uses it must not lose it to a copy that others may remove.
                    self._close()
                    return _held(AdapterFile(path, sha256, name, self.header), there)
                os.close(there)
            self._path.rename(path)
            self._is_open = False
            _locked(self._descriptor, fcntl.LOCK_SH)
            return _held(AdapterFile(path, sha256, name, self.header), self._descriptor)

    def discard(self) -> None:
        """If it was not kept."""
        with self._lock:
            if self._is_open:
                self._close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if not self._is_open:
                raise InterruptedError
            yield

    def _close(self) -> None:
        self._is_open = False
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)


class Cache:
    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes

    def find(self, key: str) -> tuple[AdapterFile, Entry] | None:
        """The file that an address gave, if it is still there."""
        try:
            entry = Entry(**json.loads(self._entry(key).read_bytes()))
            path = self.folder / f"{entry.sha256}{SUFFIX}"
            descriptor = _leased(path)
        except (OSError, ValueError, TypeError):
            return None
        if descriptor is None:
            return None
        try:
            header = read_header(path)
        except (OSError, NotSafetensorsError):
            os.close(descriptor)
            return None
        for used in (path, self._entry(key)):
            with contextlib.suppress(OSError):
                os.utime(used)
        return _held(AdapterFile(path, entry.sha256, entry.name, header), descriptor), entry

    def note(self, key: str, entry: Entry) -> None:
        descriptor, path = tempfile.mkstemp(".part", "adapter-", self.folder)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(asdict(entry), file)
        Path(path).rename(self._entry(key))

    def make_room(self, size_bytes: int) -> None:
        """For a file to come: the files that were not used for longest go, as far as needed.

        Raises:
            SourceError: the disk has no room.
        """
        self._clean()
        files = sorted(self._files(FILE), key=lambda file: file[1].st_mtime_ns)
        taken = sum(about.st_size for _, about in [*files, *self._files(PART)])
        free = shutil.disk_usage(self.folder).free
        for path, about in files:
            if taken + size_bytes <= self.budget_bytes and size_bytes <= free:
                break
            if _removed(path):
                taken -= about.st_size
                free += about.st_size
        if size_bytes > free:
            raise disk_trouble(OSError(errno.ENOSPC, "no room"))

    def _clean(self) -> None:
        """What killed workers left, and entries without a file, or too many of them."""
        for path, about in self._files(PART):
            if time.time() - about.st_mtime > LEFTOVER_SECONDS:
                _removed(path)
        there = {path.stem for path, _ in self._files(FILE)}
        entries = sorted(self._files(ENTRY), key=lambda file: -file[1].st_mtime_ns)
        for i, (path, _) in enumerate(entries):
            with contextlib.suppress(OSError):
                if i >= MAX_ENTRIES or _sha256_in(path) not in there:
                    path.unlink()

    def _files(self, names: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
        for path in list(self.folder.iterdir()):
            if names.fullmatch(path.name):
                with contextlib.suppress(OSError):  # another worker has removed it
                    yield path, path.stat()

    def _entry(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def open_cache(settings: Settings) -> Cache:
    """
    Raises:
        SourceError: the folder belongs to somebody else.
        OSError: it cannot be made.
    """
    folder = settings.lora_cache_dir
    if folder is None:
        # A name that others can tell, in a folder where they may write: it has to be ours alone.
        folder = Path(tempfile.gettempdir()) / f"sdxl-worker-loras-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        # A link, with which somebody else would choose the folder, is open to all.
        if about.st_mode & 0o077 or about.st_uid != os.geteuid():
            raise SourceError(
                "the worker's folder for downloads is open to others; its owner has to set "
                "LORA_CACHE_DIR"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return Cache(folder, int(settings.lora_cache_gb * 1e9))


def disk_trouble(error: OSError) -> SourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceError(
            "the worker's disk is full; its owner has to make room, or set LORA_CACHE_DIR to a "
            "folder on another disk"
        )
    return SourceError(
        f"the worker cannot keep it on its disk ({errno.errorcode.get(error.errno or 0, '?')}); "
        "its owner has to correct LORA_CACHE_DIR"
    )


def _sha256_in(path: Path) -> str | None:
    try:
        return Entry(**json.loads(path.read_bytes())).sha256
    except (ValueError, TypeError):
        return None


def _leased(path: Path) -> int | None:
    """A descriptor whose lock keeps the others from removing the file, if it is there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if _locked(descriptor, fcntl.LOCK_SH) and os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def _held(file: AdapterFile, descriptor: int) -> AdapterFile:
    """The lock ends with the object."""
    weakref.finalize(file, os.close, descriptor)
    return file


def _removed(path: Path) -> bool:
    """Whether it could be: not if anybody uses it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if not _locked(descriptor, fcntl.LOCK_EX) or not os.fstat(descriptor).st_nlink:
            return False
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _locked(descriptor: int, kind: int) -> bool:
    """Whether nobody holds a lock against it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
