"""The samplers: a new one for each stage, from the configuration as it was loaded."""

import pytest

from tests.support import (
    PROMPT,
    SCHEDULERS,
    models,
    run,
)

BASE_ONLY = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 8, "refiner_inference_steps": 0}


def test_schedulers_are_built_from_the_loaded_configuration_alone() -> None:
    before = dict(models().scheduler_config)
    for name in SCHEDULERS:
        run({**BASE_ONLY, "num_inference_steps": 2, "scheduler": name})
    assert dict(models().scheduler_config) == before
    with pytest.raises(TypeError):
        models().scheduler_config["beta_start"] = 1.0  # type: ignore[index]
