"""All of SDXL, without its numbers."""

from typing import Any

import pytest

from benchmarks.flops import meta_networks
from benchmarks.sdxl_architecture import write_configs


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of SDXL, on the meta device."""
    return meta_networks(write_configs(tmp_path_factory.mktemp("sdxl") / "model"))
