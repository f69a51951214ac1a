"""From the start of a process to its first request for a job."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from benchmarks import (
    coldstart,
    full_size_model,
    sdxl_architecture,
)
from benchmarks.sdxl_architecture import CONFIGS
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.serving import start
from sdxl_worker.serving.logs import JsonFormatter
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.support import REPOSITORY


def test_the_phases_are_read_from_the_worker_s_own_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sdxl_worker"), "propagate", True)
    times = iter([0.0, 1.25, 2.0, 2.5, 3.0, 3.25, 4.0, 4.75])
    monkeypatch.setattr(start.time, "perf_counter", lambda: next(times))
    with caplog.at_level(logging.INFO, "sdxl_worker"):
        for what in (
            "loaded the base",
            "drew a first picture",
            "loaded the refiner",
            "drew a first picture",
        ):
            with start._timed(what):
                pass
    monkeypatch.undo()
    lines = [JsonFormatter().format(record) for record in caplog.records]
    log = "\n".join(["--- Starting Serverless Worker ---", *lines, "[1]", '{"message": "other"}'])
    assert coldstart.phases(log) == {"loaded_s": 1.5, "first_pictures_s": 1.25}


def test_the_phases_have_the_worker_s_words() -> None:
    source = (REPOSITORY / "sdxl_worker" / "serving" / "start.py").read_text(encoding="utf-8")
    for words in coldstart.PHASES:
        assert f'"{words}"' in source, words


def test_what_no_phase_tells_is_the_rest() -> None:
    starts = [coldstart.Start(ready, 1.0, 2.0, 0.5, 0.25) for ready in (4.0, 5.0, 60.0)]
    assert coldstart.medians(starts).rest_s == 5.0 - 2.75


def test_both_workers_can_load_the_full_size_model_s_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here with the embedded model's numbers of channels."""
    small = {
        name: json.loads((EMBEDDED_MODEL_DIR / name / "config.json").read_text())
        for name in CONFIGS
    }
    monkeypatch.setattr(sdxl_architecture, "CONFIGS", small)
    with full_size_model.model_dir("full") as environment:
        root = Path(environment["MODEL_DIR"])
        load_models(find_model_dir(Settings(model_dir=root)), "float16")
        base = StableDiffusionXLPipeline.from_pretrained(root / "base", variant="fp16")
        StableDiffusionXLImg2ImgPipeline.from_pretrained(
            root / "refiner",
            variant="fp16",
            **{
                name: getattr(base, name) if name.endswith("_2") or name == "vae" else None
                for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
            },
        )
    assert not root.exists()
    with full_size_model.model_dir("") as environment:
        assert environment == {}


def test_a_start_lasts_until_the_first_request_for_a_job() -> None:
    start = coldstart.measure([sys.executable, "-m", "tests.tiny_worker"])
    assert 0.1 < start.cpu_s < 30
    assert 1 < start.ready_s < 60, "importing the SDK alone takes longer than a second"
    assert start.rest_s == start.ready_s


def test_offline_the_sdk_s_network_check_reaches_this_machine() -> None:
    """In a process of its own; the check is the SDK's."""
    script = (
        "import asyncio, sys\n"
        "from benchmarks import offline_worker\n"
        "from runpod.serverless.modules import rp_system_fitness\n"
        "connected = []\n"
        "connect = asyncio.open_connection\n"
        "async def noted(host=None, port=None, **options):\n"
        "    connected.append(host)\n"
        "    return await connect(host, port, **options)\n"
        "asyncio.open_connection = noted\n"
        "offline_worker.answer_network_check()\n"
        "asyncio.run(rp_system_fitness._check_network_connectivity())\n"
        "print(connected)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "['127.0.0.1']"


def test_both_workers_start_with_the_sdk_s_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    class Endpoint:
        def __init__(self, **options: Any) -> None:
            started.append(options["environment"])
            raise RuntimeError("seen")

    monkeypatch.setattr(coldstart, "LocalEndpoint", Endpoint)
    with pytest.raises(RuntimeError, match="seen"):
        coldstart.measure(["worker"])
    [environment] = started
    assert environment["RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"] == ""
    assert environment["RUNPOD_SKIP_GPU_CHECK"] == ""
