"""`benchmarks.rounding` draws in all of its ways, and tells one picture from another."""

import pytest

from benchmarks import rounding
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models(find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR)))


@pytest.mark.parametrize("way", rounding.WAYS)
def test_each_way_is_drawn(way: str, models: Models) -> None:
    job = {**rounding.WAYS[way], "num_inference_steps": 5}
    [one] = rounding.draw(models, **job, seed=1)
    [other] = rounding.draw(models, **job, seed=2)
    assert rounding.compared([one], [one])[:2] == ("0", "0.000%")
    assert rounding.compared([one], [other])[0] != "0"
