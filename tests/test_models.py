"""Loading: what is found by itself, what is shared, and what a wrong folder is answered with."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_worker import gpu
from sdxl_worker.drawing.batches import WORKING_MEMORY_BYTES, fits
from sdxl_worker.drawing.generate import generate
from sdxl_worker.errors import ModelError
from sdxl_worker.loading import models as models_module
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.loading.weights import Weights, start_reading
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings, load_settings
from tests.support import difference
from tools import random_model

JOB = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 4}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(EMBEDDED_MODEL_DIR, tmp_path / "model"))


def load(folder: Path, **settings: Any) -> models_module.Models:
    chosen = Settings(model_dir=folder, **settings)
    return models_module.load(start_reading(find_model_dir(chosen), chosen.dtype))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    return str(caught.value)


def first_picture(loaded: models_module.Models) -> Image.Image:
    return generate(parse_request(JOB), loaded)[0]


def test_base_and_refiner_share_what_they_have_in_common() -> None:
    loaded = load(EMBEDDED_MODEL_DIR)
    base, refiner = loaded.base, loaded.refiner
    assert refiner is not None
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        assert getattr(refiner, name) is getattr(base, name)
    assert refiner.unet is not base.unet
    assert refiner.text_encoder is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_of_random_weights_loads_and_draws(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--configs", str(EMBEDDED_MODEL_DIR), "--out", str(tmp_path / "random")]
    monkeypatch.setattr("sys.argv", ["random_model", *arguments, "--dtype", dtype])
    random_model.main()
    made = load(tmp_path / "random", dtype=dtype)
    assert made.refiner is not None
    assert made.revision != load(EMBEDDED_MODEL_DIR).revision
    assert len(first_picture(made).getcolors(128 * 128) or []) > 1, "its numbers are finite"


def test_the_refiner_folder_needs_only_its_unet(model_dir: Path) -> None:
    expected = first_picture(load(EMBEDDED_MODEL_DIR))
    for path in (model_dir / "refiner").iterdir():
        if path.name != "unet":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert first_picture(load(model_dir)).tobytes() == expected.tobytes()


def test_no_refiner_folder_means_no_refiner(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shutil.rmtree(model_dir / "refiner")
    assert load(model_dir).refiner is None
    assert "there is no refiner/" in caplog.text


def test_the_base_can_draw_while_the_refiner_s_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    take = Weights.take

    def recorded(weights: Weights, network: str) -> Any:
        order.append(network)
        return take(weights, network)

    def on_base(alone: models_module.Models) -> None:
        assert alone.refiner is None
        generate(parse_request({**JOB, "refiner_inference_steps": 0}), alone)
        order.append("drawn")

    monkeypatch.setattr(Weights, "take", recorded)
    weights = start_reading(find_model_dir(Settings()), None)
    assert models_module.load(weights, on_base=on_base).refiner is not None
    assert order.index("drawn") == order.index("refiner/unet") - 1


def test_models_are_loaded_once() -> None:
    assert load_models(Settings()) is load_models(Settings())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_set_by_the_setting(dtype: Any) -> None:
    loaded = load(EMBEDDED_MODEL_DIR, dtype=dtype)
    for module in (loaded.base.unet, loaded.base.vae, loaded.base.text_encoder):
        assert module.dtype == getattr(torch, dtype)
    assert loaded.refiner is not None
    assert loaded.refiner.unet.dtype == getattr(torch, dtype)


def test_the_default_on_a_cpu_is_float32() -> None:
    loaded = load(EMBEDDED_MODEL_DIR)
    assert loaded.dtype == (torch.float16 if torch.cuda.is_available() else torch.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_makes_about_the_same_picture(dtype: Any) -> None:
    """float16 with a decoder that asks to be upcast, as the published VAE does, included."""
    request = parse_request({"prompt": "a red circle on a blue background", "seed": 3})
    [full] = generate(request, load(EMBEDDED_MODEL_DIR))
    [half] = generate(request, load(EMBEDDED_MODEL_DIR, dtype=dtype))
    assert 0 < difference(half, full) < 2


def without_variant(folder: Path) -> None:
    for path in folder.rglob("*.fp16.safetensors"):
        path.rename(path.with_name(path.name.replace(".fp16", "")))


def test_files_with_and_without_variant_are_found_by_themselves(model_dir: Path) -> None:
    expected = first_picture(load(EMBEDDED_MODEL_DIR))
    without_variant(model_dir / "base" / "vae")  # as an image with the fp16-fix VAE has it
    assert first_picture(load(model_dir)).tobytes() == expected.tobytes()
    without_variant(model_dir)
    assert first_picture(load(model_dir)).tobytes() == expected.tobytes()


def test_full_precision_is_taken_where_it_is_wanted(model_dir: Path) -> None:
    """Beside an fp16 variant, a float32 worker loads the file that has all the digits."""
    folder = model_dir / "base" / "unet"
    unet = load(model_dir).base.unet
    with torch.no_grad():
        unet.conv_in.bias += 1e-4
    unet.save_pretrained(folder)
    assert torch.equal(load(model_dir, dtype="float32").base.unet.conv_in.bias, unet.conv_in.bias)
    narrow = load(model_dir, dtype="float16").base.unet.conv_in.bias
    assert not torch.equal(narrow, unet.conv_in.bias.half())


def test_the_scheduler_configuration_is_the_published_one() -> None:
    config = load(EMBEDDED_MODEL_DIR).scheduler_config
    expected = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_wrong_model_dir_stops_the_worker(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(tmp_path / name)
    assert message.startswith("MODEL_DIR: ")
    assert "must be a folder that holds base/" in message


@pytest.mark.parametrize(
    "damage",
    [
        "base/unet",
        "base/vae",
        "base/text_encoder",
        "base/text_encoder_2",
        "base/tokenizer/vocab.json",
        "base/tokenizer_2/merges.txt",
        "base/scheduler/scheduler_config.json",
        "refiner/unet",
        "base/unet/config.json",
        "base/vae/config.json",
    ],
)
def test_what_is_missing_is_named(model_dir: Path, damage: str) -> None:
    path = model_dir / damage
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refusal(model_dir)
    assert message.startswith("MODEL_DIR: ")
    assert damage.removesuffix("/config.json") in message


@pytest.mark.parametrize("file", ["base/unet", "base/text_encoder_2", "refiner/unet"])
def test_damaged_weights_are_named(model_dir: Path, file: str) -> None:
    [path] = (model_dir / file).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert file in refusal(model_dir)


def test_only_safetensors_are_loaded(model_dir: Path) -> None:
    [path] = (model_dir / "base" / "unet").glob("*.safetensors")
    path.rename(path.with_suffix(".bin"))
    assert "no .safetensors file, the only kind loaded" in refusal(model_dir)


def test_weights_that_do_not_fit_their_config_are_refused(model_dir: Path) -> None:
    path = model_dir / "base" / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["block_out_channels"] = [2 * width for width in config["block_out_channels"]]
    path.write_text(json.dumps(config))
    assert "base/unet" in refusal(model_dir)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DTYPE", "int8"),
        ("DTYPE", "FLOAT16 "),
        ("PNG_METADATA", "perhaps"),
        ("WORKER_CONCURRENCY", "0"),
        ("WORKER_CONCURRENCY", "9"),
        ("WORKER_CONCURRENCY", "two"),
        ("STEP_CACHE", "1"),
        ("STEP_CACHE", "6"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=f"wrong environment variable: {name}: .*{value}"):
        load_settings()


@pytest.mark.parametrize(
    "name", ["MODEL_DIR", "DTYPE", "STEP_CACHE", "PNG_METADATA", "WORKER_CONCURRENCY"]
)
def test_an_empty_setting_is_unset_as_the_hub_sends_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    assert load_settings() == Settings()


def test_models_stay_on_the_card_where_they_fit() -> None:
    weights = 11_460_000_000
    assert fits(weights, weights + WORKING_MEMORY_BYTES)
    assert not fits(weights, weights + WORKING_MEMORY_BYTES - 1)


def test_without_a_gpu_nothing_is_broken() -> None:
    assert gpu.gpu_is_broken() is False


@pytest.mark.parametrize("broken", [True, False])
def test_a_broken_gpu_is_found_by_asking_it(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        if broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu.gpu_is_broken() is broken
