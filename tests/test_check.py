"""The check job, and the check at start-up."""

import hashlib
import json
from typing import Any

import pytest
import torch
from PIL import Image

import sdxl_worker
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.errors import ModelError
from sdxl_worker.loading import models as models_module
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models
from sdxl_worker.loading.weights import start_reading
from sdxl_worker.settings import Settings
from tests.support import PROMPT, error, models, picture, run


def test_a_bare_check_reports_on_a_real_picture_in_under_2_kb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    generate = generate_module.generate

    def counted(request: Any, loaded: Any, image: Any, on_step: Any) -> Any:
        def count(step: generate_module.Step) -> None:
            steps.append(step)
            on_step(step)

        return generate(request, loaded, image, count)

    monkeypatch.setattr(generate_module, "generate", counted)
    report = run({"check": True})
    assert len(json.dumps(report)) < 2000
    assert [step.stage for step in steps] == ["base", "base", "refiner"]
    assert report["model"] == "shapes"
    assert report["revision"] == models().revision
    assert report["refiner"] is True
    assert report["versions"]["sdxl_worker"] == sdxl_worker.__version__
    assert set(report["versions"]) >= {"runpod", "torch", "diffusers", "transformers", "cuda"}
    assert report["device"]
    assert report["dtype"] == "float32"
    assert report["peak_memory_mb"] > 50
    assert report["steps"] == 3
    assert 0 < report["ms_per_step"] <= report["generate_ms"]


def test_a_check_of_a_request_runs_it_in_full_and_tells_its_digest() -> None:
    job_input = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "height": 64, "width": 96}
    report = run({**job_input, "check": True, "num_images": 2})
    assert (report["width"], report["height"], report["seed"]) == (96, 64, 3)
    assert report["steps"] == 4 + 15
    assert len(json.dumps(report)) < 2000
    assert "images" not in report
    single = run({**job_input, "check": True})
    pixels = picture(**job_input).tobytes()
    assert single["sha256"] == [hashlib.sha256(pixels).hexdigest()]


def test_a_check_with_wrong_input_is_refused() -> None:
    assert error({"check": True, "prompt": "a", "height": 65}).startswith("height: ")


def test_a_check_is_in_under_2_kb_for_eight_pictures() -> None:
    report = run({"check": True, "prompt": "a", "num_images": 8, "num_inference_steps": 1})
    assert len(report["sha256"]) == 8
    assert len(json.dumps(report)) < 2000


def test_the_base_draws_before_the_refiner_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what only the first picture costs is spent while weights are still being read."""
    with_refiner: list[bool] = []
    draw = check._draw

    def noted(loaded: Models) -> Image.Image:
        with_refiner.append(loaded.refiner is not None)
        return draw(loaded)

    monkeypatch.setattr(check, "_draw", noted)
    monkeypatch.setattr(models_module, "_loaded", {})
    check.prepare(Settings(), start_reading(find_model_dir(Settings()), None))
    assert with_refiner == [False, True]


def test_start_up_draws_a_picture(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    check.prepare(Settings(), start_reading(find_model_dir(Settings()), None))
    seconds = [vars(record).get("seconds") for record in caplog.records]
    assert [line.partition(" in ")[0] for line in caplog.messages if " s" in line][-2:] == [
        "loaded the models",
        "warmed up",
    ]
    assert all(isinstance(value, float) for value in seconds[-2:])


def test_an_empty_picture_at_start_up_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Image.new("RGB", (64, 64))
    monkeypatch.setattr(check, "generate", lambda *_: [empty])
    with pytest.raises(ModelError, match="draw an empty picture"):
        check.prepare(Settings(), start_reading(find_model_dir(Settings()), None))


def test_weights_that_are_not_numbers_end_the_worker() -> None:
    bias = models().base.unet.conv_out.bias
    kept = bias.data.clone()
    try:
        bias.data.fill_(torch.nan)
        with pytest.raises(ModelError, match="draw an empty picture"):
            check.prepare(Settings(), start_reading(find_model_dir(Settings()), None))
    finally:
        bias.data.copy_(kept)
