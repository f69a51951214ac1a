"""Reading files into the system's page cache ahead of time.

It needs no torch, whose import takes longer than a fast disk needs for the first files.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

# Linux reads one window of a request and drops the rest; this is the smallest window in use.
WINDOW_BYTES = 128 * 1024


def read_ahead(files: Iterable[Path]) -> threading.Thread:
    """Have the system read files, in a thread that nobody waits for."""
    thread = threading.Thread(target=_advise, args=(list(files),), daemon=True)
    thread.start()
    return thread


def _advise(files: list[Path]) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for offset in range(0, file.stat().st_size, WINDOW_BYTES):
                os.posix_fadvise(descriptor, offset, WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
