import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_worker.loading import model_dir
from sdxl_worker.settings import Settings
from tests.s3_server import S3Server, s3_server

# Before torch is imported. The tests run in parallel processes, each of which does best with one
# thread; and with more, workers that they start would round otherwise than they do.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests import onnxruntime by themselves, too: nobody is told of that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings and models of the machine that runs the tests must not reach them."""
    for name in [*Settings.model_fields, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"]:
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("BAKED_MODEL_DIR", "PLATFORM_CACHE"):
        monkeypatch.setattr(model_dir, name, Path("/nowhere"))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """With a bucket `pics`."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "pics").mkdir()
    with s3_server(folder) as running:
        yield running
