"""The check job, and the report that answers it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sdxl_worker
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing.steps import Step
from sdxl_worker.serving import beside
from tests.control_networks import single, union, write
from tests.loading.transformers_networks import save_depth_network
from tests.random_ip_adapters import ENCODER, FACE, PLAIN, make_encoder, plain_adapter
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


def test_a_check_tells_what_requests_may_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controlnets, adapters, upscalers = (tmp_path / name for name in ("c", "i", "u"))
    write(single(), controlnets / "own-canny-lineart-tile-depth")
    write(single(), controlnets / "pose", cross_attention_dim=2048)
    (adapters / "sdxl_models").mkdir(parents=True)
    save_file(plain_adapter(models().unet), adapters / PLAIN)
    save_file({"x": torch.zeros(1)}, adapters / FACE)
    make_encoder(adapters / ENCODER)
    upscalers.mkdir()
    (upscalers / "4x-UltraSharp.pth").touch()
    monkeypatch.setenv("CONTROLNET_DIR", str(controlnets))
    monkeypatch.setenv("IP_ADAPTER_DIR", str(adapters))
    monkeypatch.setenv("UPSCALER_DIR", str(upscalers))
    report = run({"check": True})
    assert report["controlnets"] == ["canny", "depth", "lineart", "tile"]
    assert report["preprocessors"] == ["canny", "tile"]
    assert report["ip_adapters"] == ["plain", "style", "layout"]
    assert report["upscalers"] == ["lanczos", "4x-UltraSharp"]
    save_depth_network(controlnets / "preprocessors" / "depth")
    assert run({"check": True})["preprocessors"] == ["canny", "depth", "tile"]


def test_of_a_worker_without_them_it_tells_none() -> None:
    report = run({"check": True})
    names = ("controlnets", "preprocessors", "ip_adapters", "upscalers")
    assert [report[name] for name in names] == [[], [], [], ["lanczos"]]


def test_a_check_is_in_under_2_kb_for_eight_pictures_of_a_worker_that_has_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(union(), tmp_path / "union")
    for i in range(30):
        (tmp_path / f"{i:02}-{'ü' * 5}.pth").touch()
    for name in ("CONTROLNET_DIR", "UPSCALER_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    everything = ["plus", "plain", "face", "style", "layout"]
    monkeypatch.setattr(beside, "_has_adapter", lambda kind, *_: kind in everything)
    monkeypatch.setattr(beside, "_makes_maps", lambda *_: True)
    report = run({"check": True, "prompt": "a", "num_images": 8, "num_inference_steps": 1})
    assert len(report["sha256"]) == 8
    assert len(report["controlnets"]) == len(report["preprocessors"]) == 10
    assert sorted(report["ip_adapters"]) == sorted(everything)
    assert report["upscalers"] == ["lanczos", *(f"{i:02}-üüüüü" for i in range(5)), "and 25 more"]
    assert len(json.dumps(report)) < 2000


def test_a_check_with_wrong_input_is_refused() -> None:
    assert error({"check": True, "prompt": "a", "height": 65}).startswith("height: ")
