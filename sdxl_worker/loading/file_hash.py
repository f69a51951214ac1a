"""SHA-256 of single files, by which Civitai and others find a model. It takes seconds for some
gigabytes, so nothing waits for it."""

import hashlib
import logging
import threading
from pathlib import Path

log = logging.getLogger(__name__)

Key = tuple[Path, int, int]
_known: dict[Key, str] = {}


def known_hash(path: Path) -> str | None:
    """64 hex digits. None: it is not known yet."""
    return _known.get(_key(path))


def hash_in_background(path: Path) -> threading.Thread:
    """Find out `known_hash`, in a thread that nobody has to wait for."""
    thread = threading.Thread(target=_hash, args=(path,), daemon=True, name="hash")
    thread.start()
    return thread


def _hash(path: Path) -> None:
    key = _key(path)
    if key in _known:
        return
    try:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        log.warning("%s cannot be read for its hash: %s", path, error)


def _key(path: Path) -> Key:
    try:
        status = path.stat()
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns
