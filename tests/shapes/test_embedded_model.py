"""The miniature model in the repository: small, laid out as published, as good as it claims."""

import functools
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from shapes.captions import Meaning, full_prompts
from shapes.judge import Judgement, judge
from tests.support import SCHEDULERS, models, picture

WEIGHTS = sorted(EMBEDDED_MODEL_DIR.rglob("*.safetensors"))


def test_the_weights_are_at_most_10_mb_in_fp16() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS) <= 10_000_000
    for path in WEIGHTS:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_it_has_the_files_of_the_published_layout_and_no_weights_twice() -> None:
    names = [path.relative_to(EMBEDDED_MODEL_DIR).as_posix() for path in WEIGHTS]
    assert names == [
        "base/text_encoder/model.fp16.safetensors",
        "base/text_encoder_2/model.fp16.safetensors",
        "base/unet/diffusion_pytorch_model.fp16.safetensors",
        "base/vae/diffusion_pytorch_model.fp16.safetensors",
        "refiner/unet/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in WEIGHTS}) == len(WEIGHTS)


def test_it_is_of_the_family_of_sdxl() -> None:
    loaded = models()
    assert loaded.unet.config.addition_embed_type == "text_time"
    assert loaded.vae.config.latent_channels == 4
    assert loaded.native_size_px == 8 * loaded.unet.config.sample_size
    assert loaded.vae.config.scaling_factor == 0.13025
    assert loaded.refiner_unet is not None
    assert loaded.refiner_takes_aesthetic_score is True
    width = loaded.text_encoder_2.config.hidden_size
    assert loaded.refiner_unet.config.cross_attention_dim == width
    assert loaded.unet.config.cross_attention_dim == width + loaded.text_encoder.config.hidden_size


def test_no_configuration_tells_of_the_machine_it_was_made_on() -> None:
    for path in EMBEDDED_MODEL_DIR.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "/tmp" not in text  # noqa: S108
        assert not json.loads(text).get("_name_or_path", "")


def test_a_default_request_takes_at_most_15_seconds() -> None:
    picture(prompt="a star", seed=0, num_inference_steps=1)  # what only the first picture costs
    started = time.process_time()
    picture(prompt="a red circle on a blue background", seed=0)
    assert time.process_time() - started < 15


@functools.cache
def judged(count: int, scheduler: str, **settings: Any) -> list[tuple[Meaning, Judgement]]:
    """Prompts in mixed wordings, drawn by the worker."""
    return [
        (meaning, judge(picture(prompt=prompt, seed=i, scheduler=scheduler, **settings)))
        for i, (prompt, meaning) in enumerate(full_prompts(count, seed=77))
    ]


def share(seen: Sequence[tuple[Meaning, Judgement]], *names: str) -> float:
    return statistics.mean(
        all(getattr(meaning, name) == getattr(judgement, name) for name in names)
        for meaning, judgement in seen
    )


def mean(seen: Sequence[tuple[Meaning, Judgement]], name: str) -> float:
    return statistics.mean(getattr(judgement, name) for _, judgement in seen)


def test_at_the_defaults_colours_and_shapes_are_right_and_edges_crisp() -> None:
    seen = judged(40, "DDIM")
    assert share(seen, "color", "background") >= 0.95
    assert share(seen, "shape") >= 0.9
    assert mean(seen, "iou") > 0.9
    assert mean(seen, "flat_distance") < 8


def test_refined_pictures_are_not_worse_than_the_base_s() -> None:
    base, refined = judged(40, "DDIM", refiner_inference_steps=0), judged(40, "DDIM")
    for names in (("color", "background"), ("shape",)):
        assert share(refined, *names) >= share(base, *names)
    assert mean(refined, "iou") >= mean(base, "iou") - 0.005
    assert mean(refined, "flat_distance") <= mean(base, "flat_distance") + 0.5


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "DDIM"])
def test_no_scheduler_is_much_worse_than_the_default(scheduler: str) -> None:
    usual = judged(16, "DDIM", refiner_inference_steps=0)
    seen = judged(16, scheduler, refiner_inference_steps=0)
    assert share(seen, "color", "background", "shape") >= (
        share(usual, "color", "background", "shape") - 0.07
    )
    assert mean(seen, "iou") >= mean(usual, "iou") - 0.03
    assert mean(seen, "flat_distance") <= mean(usual, "flat_distance") + 5
