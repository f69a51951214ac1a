"""The weight files of a model, and reading them ahead."""

import os
from pathlib import Path

import pytest

from sdxl_worker.loading.model_dir import ModelDir
from sdxl_worker.loading.weight_files import READ_AHEAD_BYTES, network_files, read_ahead
from sdxl_worker.settings import EMBEDDED_MODEL_DIR

EMBEDDED = ModelDir(EMBEDDED_MODEL_DIR, EMBEDDED_MODEL_DIR / "base", EMBEDDED_MODEL_DIR / "refiner")


def test_the_base_is_read_before_the_refiner() -> None:
    files = network_files(EMBEDDED, half_precision=True)
    assert list(files)[-1] == "refiner_unet"
    assert len(files) == 5


def test_reading_ahead_asks_for_every_file_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In windows: of a larger request, Linux reads the beginning."""
    asked: dict[str, list[tuple[int, int]]] = {}

    def advise(descriptor: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        asked.setdefault(str(path), []).append((offset, size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    by_network = network_files(EMBEDDED, half_precision=True)
    files = [path for paths in by_network.values() for path in paths]
    read_ahead(files).join()
    assert list(asked) == [str(path.resolve()) for path in files]
    assert len(asked) == 5
    for path in files:
        end = 0
        for offset, size in asked[str(path.resolve())]:
            assert offset == end
            assert size <= READ_AHEAD_BYTES
            end = offset + size
        assert end >= path.stat().st_size
