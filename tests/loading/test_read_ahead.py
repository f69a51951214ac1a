"""Files are in the page cache before they are read."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest

from sdxl_worker.loading.read_ahead import read_ahead

PAGES = 16_384  # 64 MB, of which a single request reads 8 at most
SIZE = PAGES * mmap.PAGESIZE


def cached_share(path: Path) -> float:
    """How much of a file the system holds, as mincore(2) tells."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * PAGES)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as view:
        address = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.byref(address), ctypes.c_size_t(SIZE), pages)
        del address
    assert failed == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) / PAGES


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is told of on Linux only")
def test_reading_ahead_leaves_whole_files_in_the_page_cache(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for path in files:
        path.write_bytes(os.urandom(SIZE))
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if cached_share(files[0]) > 0.1:
        pytest.skip(f"{tmp_path} is in memory: nothing of it can be out of the page cache")
    read_ahead(files).join()
    for path in files:
        # Requests are queued; the disk may still be at the last of them.
        for _ in range(200):
            if (share := cached_share(path)) == 1:
                break
            os.sync()
        assert share == 1


def test_a_system_without_the_call_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    read_ahead([tmp_path / "none"]).join()
