"""Memory that a job leaves behind goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

from sdxl_worker import host_memory
from sdxl_worker.host_memory import give_back_host_memory
from tests.support import REPOSITORY

# Small pieces, of which one in a hundred stays: the C library keeps all that lies between.
SCRIPT = """
import psutil
from sdxl_worker.host_memory import give_back_host_memory
pieces = [bytes(10_000) for _ in range(20_000)]
kept = pieces[::100]
del pieces
before = psutil.Process().memory_info().rss
give_back_host_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps it, and gives it back"
)
def test_what_is_free_between_what_is_not_goes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100e6


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    host_memory._malloc_trim.cache_clear()
    give_back_host_memory()
    host_memory._malloc_trim.cache_clear()
