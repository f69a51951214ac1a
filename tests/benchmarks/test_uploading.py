"""What uploading adds to a job."""

import json
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from benchmarks import uploading


def test_both_rows_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(jobs: int, upload_seconds: float | None) -> dict[str, float]:
        return {"seconds": jobs + (upload_seconds or 0)}

    monkeypatch.setattr(uploading, "measure", measured)
    arguments = ["uploading", "--jobs", "5", "--upload-seconds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    uploading.main()
    written = json.loads((tmp_path / "uploading.json").read_text())
    assert (written["jobs"], written["upload_s"]) == (5, 3.0)
    assert (written["inline"], written["uploaded"]) == ({"seconds": 5}, {"seconds": 8.0})
    assert written["date"]


def test_the_storage_takes_its_time() -> None:
    storage = uploading.SlowStorage(0.3)
    url = f"http://127.0.0.1:{storage.server_port}/a"
    began = time.monotonic()
    with urllib.request.urlopen(urllib.request.Request(url, b"data", method="PUT")) as response:
        assert response.status == 200
    assert time.monotonic() - began >= 0.3
    storage.shutdown()
    storage.server_close()
