"""Jobs with LoRAs: models of few steps, rounding, memory, stopping, the refiner, the step cache."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import PngImagePlugin
from safetensors.torch import load_file, save_file

from sdxl_worker import few_step
from sdxl_worker.adapters import patching
from sdxl_worker.adapters.of_request import Adapters, read_adapters
from sdxl_worker.adapters.patching import Patches, patches_of
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing import second_tries
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.inputs.adapter_files import fetch_adapters
from sdxl_worker.loading import file_hash
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request, parse_request
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.progress import JobStopped
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.own_files import TEXT_MODULE, UNET_MODULES, write_lora
from tests.support import PROMPT, decoded, fresh_models, models, run
from tools import original_format

SMALL: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "height": 64, "width": 64}
FEW_STEP = {
    "few_step.family": "Own",
    "few_step.steps": "4",
    "few_step.scheduler": "LCM",
    "few_step.guidance_scale": "1.0",
}
LORA = {"loras": [{"path": "style.safetensors"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    path = write_lora(folder / "style.safetensors", seed=5)
    save_file(load_file(path), folder / "fast.safetensors", metadata=FEW_STEP)
    return folder


@pytest.fixture(autouse=True)
def _lora_dir(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIR", str(folder))


@pytest.fixture(scope="module")
def shared_models() -> Models:
    return fresh_models()


@pytest.fixture
def own_models(shared_models: Models) -> Models:
    """With nothing on."""
    patches_of(shared_models).restore()
    return shared_models


def adapters_of(request: Request, folder: Path, to: Models) -> Adapters:
    paths = {f"loras[{i}].path": one.path for i, one in enumerate(request.loras or ())}
    settings = Settings(lora_dir=folder)
    files = asyncio.run(fetch_adapters(paths, settings, lambda *_: None))
    return read_adapters(request, files, to)


def drawn(job_input: dict[str, Any], folder: Path, by: Models, **options: Any) -> bytes:
    request = parse_request({**SMALL, **job_input})
    adapters = adapters_of(request, folder, by)
    stages = plan_stages(request, by)
    [picture] = generate_module.generate(request, stages, by, adapters=adapters, **options)
    return picture.tobytes()


def weights(of: Models) -> dict[str, torch.Tensor]:
    return {
        f"{network}.{name}": tensor.clone()
        for network, module in of.networks().items()
        for name, tensor in module.state_dict().items()
    }


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def slowly(function: Callable[[Path], None]) -> Callable[[Path], None]:
    def slow(path: Path) -> None:
        time.sleep(0.5)
        function(path)

    return slow


class TestFewSteps:
    def asked(self, **fields: Any) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
        """The output, the picture's text, and the request in it."""
        output = run({**SMALL, "loras": [{"path": "fast.safetensors"}], **fields})
        picture = decoded(output["images"][0])
        assert isinstance(picture, PngImagePlugin.PngImageFile)
        text = {name: str(one) for name, one in picture.text.items()}
        return output, text, json.loads(text["request"])

    def test_a_lora_brings_its_authors_settings_and_turns_the_refiner_off(self) -> None:
        output, text, request = self.asked()
        assert "warning" not in output
        assert text["few_step"] == "Own"
        expected = ("LCM", 4, 1.0, 0)
        names = ("scheduler", "num_inference_steps", "guidance_scale", "refiner_inference_steps")
        assert tuple(request[name] for name in names) == expected
        again = run(request)
        assert decoded(again["images"][0]).tobytes() == decoded(output["images"][0]).tobytes()

    def test_what_the_request_names_stays_and_what_it_will_not_do_is_told(self) -> None:
        output, _, request = self.asked(
            scheduler="K_EULER",
            num_inference_steps=6,
            negative_prompt="a star",
            refiner_inference_steps=4,
            strength=0.5,
        )
        assert (request["scheduler"], request["num_inference_steps"]) == ("K_EULER", 6)
        assert request["refiner_inference_steps"] == 4
        assert "made for 4 steps; got 6" in output["warning"]
        assert "negative_prompt: has no effect" in output["warning"]

    def test_at_scale_0_it_is_none(self) -> None:
        *_, request = self.asked(loras=[{"path": "fast.safetensors", "scale": 0}])
        assert request["scheduler"] == "DDIM"

    def test_a_checkpoint_tells_it_in_its_own_metadata(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = original_format.base_checkpoint(EMBEDDED_MODEL_DIR / "base")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, tmp_path / "quick.safetensors", metadata=FEW_STEP)
        monkeypatch.setenv("MODELS_DIR", str(tmp_path))
        *_, request = self.asked(loras=None, model="quick")
        assert (request["scheduler"], request["num_inference_steps"]) == ("LCM", 4)

    def test_a_checkpoint_under_another_name_is_known_by_its_hash_from_the_first_job_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "mine.safetensors"
        original_format.save(original_format.base_checkpoint(EMBEDDED_MODEL_DIR / "base"), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(few_step, "HASHES", {sha256: "sdxl_lightning_4step"})
        monkeypatch.setattr(start_module, "CHECKPOINT_BYTES", {path.stat().st_size})
        monkeypatch.setattr(file_hash, "_hash", slowly(file_hash._hash))
        monkeypatch.setenv("MODELS_DIR", str(tmp_path))
        _, text, request = self.asked(loras=None, model="mine")
        assert text["few_step"] == "SDXL-Lightning"
        assert (request["scheduler"], request["num_inference_steps"]) == ("K_EULER", 4)


def test_with_bfloat16_weights_the_answer_tells_what_rounding_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {**SMALL, "num_inference_steps": 2, "refiner_inference_steps": 0}
    fine = {"loras": [{"path": "style.safetensors", "scale": 0.05}]}
    assert "warning" not in run({**asked, **fine})
    monkeypatch.setenv("DTYPE", "bfloat16")
    warning = run({**asked, **fine})["warning"]
    assert warning.startswith("loras: rounding to bfloat16 lost ")
    assert "warning" not in run(asked), "of a LoRA that is off again"


def test_the_refiner_reads_its_prompt_without_the_lora(folder: Path, own_models: Models) -> None:
    fields = {
        "prompt": "a star",
        "high_noise_frac": 0.5,
        "refiner_inference_steps": 4,
        "num_inference_steps": 4,
    }
    request = parse_request({**SMALL, **fields, **LORA})
    stages = plan_stages(request, own_models)
    # By encoders of their own: what one has read is kept for the next time.
    plain = generate_module._encode(request, stages, fresh_models(), ())
    patches = patches_of(own_models)
    patches.apply(adapters_of(request, folder, own_models).loras)
    patched = generate_module._encode(request, stages, own_models, ())
    patches.restore()
    for one, other in zip(plain["refiner"], patched["refiner"], strict=True):
        assert torch.equal(one.hidden_2, other.hidden_2)
        assert torch.equal(one.pooled, other.pooled)
    assert not torch.equal(plain["base"][0].hidden_2, patched["base"][0].hidden_2)
    assert not torch.equal(plain["base"][0].hidden_1, patched["base"][0].hidden_1)


@pytest.mark.parametrize("step_cache_interval", [None, 2])
def test_it_draws_what_weights_that_were_merged_by_hand_draw(
    step_cache_interval: int | None, folder: Path, own_models: Models
) -> None:
    fields = {"num_inference_steps": 4, "refiner_inference_steps": 0, "scheduler": "K_EULER"}
    got = drawn({**fields, **LORA}, folder, own_models, step_cache_interval=step_cache_interval)
    merged = fresh_models()
    tensors = load_file(folder / "style.safetensors")
    modules = [(f"unet.{name}", merged.unet.get_submodule(name)) for name in UNET_MODULES]
    modules += [
        (f"text_encoder.text_model.{TEXT_MODULE}", merged.text_encoder.get_submodule(TEXT_MODULE)),
        (
            f"text_encoder_2.text_model.{TEXT_MODULE}",
            merged.text_encoder_2.get_submodule(f"text_model.{TEXT_MODULE}"),
        ),
    ]
    with torch.no_grad():
        for name, module in modules:
            down, up = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
            weight: Any = module.weight
            weight += up @ down
    expected = drawn(fields, folder, merged, step_cache_interval=step_cache_interval)
    assert got == expected
    assert drawn(fields, folder, own_models, step_cache_interval=step_cache_interval) != got


def test_where_memory_does_not_do_it_is_put_on_again_with_originals_on_the_host(
    folder: Path, own_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"num_inference_steps": 2, "refiner_inference_steps": 0, **LORA}
    expected = drawn(fields, folder, own_models)
    patches_of(own_models).restore()  # or it would be on already
    change, calls = Patches._change, []

    def short_of_memory(self: Patches, *arguments: Any) -> None:
        change(self, *arguments)
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(patching.Patches, "_change", short_of_memory)
    before = second_tries.COUNTS["LoRAs applied again"]
    assert drawn(fields, folder, own_models) == expected
    assert second_tries.COUNTS["LoRAs applied again"] == before + 1


@pytest.mark.parametrize("at", ["while it is put on", "while it is drawn with"])
def test_a_job_that_is_stopped_leaves_the_weights_as_they_were(
    at: str, folder: Path, own_models: Models
) -> None:
    before = weights(own_models)
    checks = 0

    def stop(*_: Any) -> None:
        nonlocal checks
        checks += 1
        if checks == 5 or at == "while it is drawn with":
            raise JobStopped

    hook = {"check" if at == "while it is put on" else "on_step": stop}
    fields = {"num_inference_steps": 2, "refiner_inference_steps": 0, **LORA}
    with pytest.raises(JobStopped):
        drawn(fields, folder, own_models, **hook)
    assert patches_of(own_models).key == ()
    assert same(before, weights(own_models))


def test_a_check_tells_how_many_are_on() -> None:
    plain = run({"check": True})
    assert (plain["kind"], plain["loras"], plain["loras_originals_mb"]) == ("epsilon", 0, 0)
    report = run({**SMALL, **LORA, "check": True, "num_inference_steps": 2})
    assert report["loras"] == 1
    assert report["loras_originals_mb"] == round(patches_of(models()).originals_bytes / 1e6)
