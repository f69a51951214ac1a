"""The system's page cache: taking files out of it, and seeing whether they are out."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

PROBES = 64


def forget(files: Iterable[Path]) -> None:
    """Take files out of the page cache, as on a machine that never read them.

    What some process has mapped stays, and so does all of a file system in memory.
    """
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # what is not on the disk yet would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def share_kept(files: Iterable[Path]) -> float | None:
    """Which share of files is in the page cache, from a few places of each; None: not known."""
    kept = []
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            size = path.stat().st_size
            for probe in range(PROBES):
                try:
                    # It gives what lies in the page cache, and reads nothing.
                    os.preadv(file, [bytearray(1)], size * probe // PROBES, os.RWF_NOWAIT)
                    kept.append(True)
                except BlockingIOError:
                    kept.append(False)
                except OSError as error:
                    if error.errno == errno.EOPNOTSUPP:
                        return None
                    raise
        finally:
            os.close(file)
    return sum(kept) / len(kept) if kept else None
