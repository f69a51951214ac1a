from collections.abc import Iterator

import pytest
import torch

from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.loading.models import Models
from tests.adapters.lora_files import weights
from tests.support import fresh_models


@pytest.fixture(scope="session")
def shared_models() -> Models:
    return fresh_models()


@pytest.fixture
def models(shared_models: Models) -> Iterator[Models]:
    """In fp32. What a test puts on must come off again, bit for bit."""
    torch.manual_seed(0)
    before = weights(shared_models)
    yield shared_models
    patches_of(shared_models).restore()
    after = weights(shared_models)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
