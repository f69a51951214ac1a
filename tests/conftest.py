from pathlib import Path

import pytest
import torch

from sdxl_worker import model_dir
from sdxl_worker.settings import Settings

# The tests run in parallel processes, each of which does best with one thread.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings and models of the machine that runs the tests must not reach them."""
    for name in [*Settings.model_fields, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"]:
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("BAKED_MODEL_DIR", "PLATFORM_CACHE"):
        monkeypatch.setattr(model_dir, name, Path("/nowhere"))
