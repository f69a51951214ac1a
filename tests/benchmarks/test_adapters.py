"""`benchmarks.adapters`, on the embedded model throughout."""

from pathlib import Path

import torch

from benchmarks import adapters
from sdxl_worker.adapters.patching import patches_of
from tests.support import fresh_models


def test_steps_are_timed_with_each_count_of_loras(tmp_path: Path) -> None:
    models = fresh_models()
    counted: list[int] = []
    models.unet.register_forward_pre_hook(lambda *_: counted.append(len(patches_of(models).key)))
    ratios = adapters.step_ratios(models, tmp_path, rounds=2)
    assert ratios[0] == [1, 1]
    assert {count: len(values) for count, values in ratios.items()} == dict.fromkeys(
        (0, 1, 2, 4), 2
    )
    assert counted[5:] == 2 * [count for count in (0, 1, 2, 4) for _ in range(5)]


def test_changes_are_timed_and_undone(tmp_path: Path) -> None:
    models = fresh_models(dtype=torch.float16)
    figures = adapters.changing(models, tmp_path, rounds=1)
    size = sum(weight.nbytes for weight in adapters.attention_weights(models).values())
    assert figures["modules"] == 84
    assert figures["originals_gb"] == round(size / 1e9, 2)
    assert figures["bit_equal_after"]
    assert 0 < figures["lost"] < 0.1
