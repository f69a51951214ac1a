"""A full-size model with random weights."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.support import draw
from tools import random_model

JOB = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 4}


def load(folder: Path, **settings: Any) -> Models:
    chosen = Settings(model_dir=folder, **settings)
    return load_models(find_model_dir(chosen), chosen.dtype)


def first_picture(loaded: Models) -> Image.Image:
    return draw(parse_request(JOB), loaded)[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_of_random_weights_loads_and_draws(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--configs", str(EMBEDDED_MODEL_DIR), "--out", str(tmp_path / "random")]
    monkeypatch.setattr("sys.argv", ["random_model", *arguments, "--dtype", dtype])
    random_model.main()
    made = load(tmp_path / "random", dtype=dtype)
    assert made.refiner_unet is not None
    assert made.revision != load(EMBEDDED_MODEL_DIR).revision
    assert len(first_picture(made).getcolors(128 * 128) or []) > 1, "its numbers are finite"
