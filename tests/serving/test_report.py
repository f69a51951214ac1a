"""The check job, and the report that answers it."""

import hashlib
import json
from typing import Any

import pytest

import sdxl_worker
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing.steps import Step
from tests.support import PROMPT, error, models, picture, replace_generate, run


def test_a_bare_check_reports_on_a_real_picture_in_under_2_kb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    generate = generate_module.generate

    def counted(
        request: Any, stages: Any, loaded: Any, image: Any, on_step: Any, **options: Any
    ) -> Any:
        def count(step: Step) -> None:
            steps.append(step)
            on_step(step)

        return generate(request, stages, loaded, image, count, **options)

    replace_generate(monkeypatch, counted)
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
