"""The ways that are compared."""

import dataclasses

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
)

from benchmarks import (
    ways,
)
from tests.support import fresh_models


def test_2_1_0_offloads_both_pipelines_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded: list[str] = []
    monkeypatch.setattr(
        DiffusionPipeline,
        "enable_model_cpu_offload",
        lambda pipeline: offloaded.append(type(pipeline).__name__),
    )
    fresh = fresh_models()
    ways.Version210(fresh)
    assert offloaded == []
    gpu = dataclasses.replace(fresh.placement, device=torch.device("cuda"))
    ways.Version210(dataclasses.replace(fresh, placement=gpu))
    assert offloaded == ["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"]
