"""Loading: what is found by itself, what is shared, and what a wrong folder is answered with."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from sdxl_worker.errors import ModelError
from sdxl_worker.loading import models as models_module
from sdxl_worker.loading.model_dir import ModelDir, find_model_dir
from sdxl_worker.loading.models import Models, add_refiner, load_base, load_models
from sdxl_worker.loading.weights import Weights
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.support import difference, draw, weights_being_read

JOB = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 4}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(EMBEDDED_MODEL_DIR, tmp_path / "model"))


def load(folder: Path, **settings: Any) -> Models:
    chosen = Settings(model_dir=folder, **settings)
    return load_models(find_model_dir(chosen), chosen.dtype)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    return str(caught.value)


def first_picture(loaded: Models) -> Image.Image:
    return draw(parse_request(JOB), loaded)[0]


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
    assert load(model_dir).refiner_unet is None
    assert "there is no refiner/" in caplog.text


def test_the_base_can_draw_while_the_refiner_s_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    take = Weights.take

    def recorded(weights: Weights, network: str) -> Any:
        order.append(network)
        return take(weights, network)

    monkeypatch.setattr(Weights, "take", recorded)
    weights = weights_being_read()
    alone = load_base(weights)
    assert alone.refiner_unet is None
    assert "refiner_unet" not in order
    draw(parse_request({**JOB, "refiner_inference_steps": 0}), alone)
    assert add_refiner(alone, weights).refiner_unet is not None
    assert order[-1] == "refiner_unet"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_set_by_the_setting(dtype: Any) -> None:
    loaded = load(EMBEDDED_MODEL_DIR, dtype=dtype)
    for module in (loaded.unet, loaded.vae, loaded.text_encoder):
        assert module.dtype == getattr(torch, dtype)
    assert loaded.refiner_unet is not None
    assert loaded.refiner_unet.dtype == getattr(torch, dtype)


def test_the_default_on_a_cpu_is_float32() -> None:
    loaded = load(EMBEDDED_MODEL_DIR)
    assert loaded.dtype == (torch.float16 if torch.cuda.is_available() else torch.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_makes_about_the_same_picture(dtype: Any) -> None:
    """float16 with a decoder that asks to be upcast, as the published VAE does, included."""
    request = parse_request({"prompt": "a red circle on a blue background", "seed": 3})
    [full] = draw(request, load(EMBEDDED_MODEL_DIR))
    [half] = draw(request, load(EMBEDDED_MODEL_DIR, dtype=dtype))
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
    unet = load(model_dir).unet
    with torch.no_grad():
        unet.conv_in.bias += 1e-4
    unet.save_pretrained(folder)
    assert torch.equal(load(model_dir, dtype="float32").unet.conv_in.bias, unet.conv_in.bias)
    narrow = load(model_dir, dtype="float16").unet.conv_in.bias
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


def test_a_wrong_model_dir_stops_the_worker(tmp_path: Path) -> None:
    message = refusal(tmp_path / "missing")
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


EMBEDDED = ModelDir(EMBEDDED_MODEL_DIR, EMBEDDED_MODEL_DIR / "base", EMBEDDED_MODEL_DIR / "refiner")


CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


class Read:
    """Stands for `Weights` that were read."""

    model_dir = EMBEDDED

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def take(self, _: str) -> dict[str, torch.Tensor]:
        return self.tensors


def test_text_encoders_of_older_files_load() -> None:
    """Published SDXL repositories have the prefix that transformers 5 dropped, and position ids."""
    folder = EMBEDDED_MODEL_DIR / "base" / "text_encoder"
    now = weights_being_read().take("text_encoder")
    old = {f"text_model.{name}": tensor for name, tensor in now.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    built = [
        models_module._load("text_encoder", cast(Any, Read(tensors))) for tensors in (now, old)
    ]
    ids = torch.arange(77)[None]
    with torch.no_grad():
        one, other = (encoder(ids).last_hidden_state for encoder in built)
        plain = CLIPTextModel.from_pretrained(folder, variant="fp16", dtype=torch.float32)(ids)
    assert torch.equal(one, other)
    assert torch.equal(one, plain.last_hidden_state)
    assert not any(tensor.is_meta for tensor in built[1].buffers())
    assert CLIPTextConfig.from_pretrained(folder).num_hidden_layers == len(built[1].encoder.layers)


def test_decoders_of_early_files_load() -> None:
    now = weights_being_read().take("vae")
    early_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    early = {}
    for name, tensor in now.items():
        for part, early_part in early_names.items():
            name = name.replace(f"attentions.0.{part}.", f"attentions.0.{early_part}.")
        early[name] = tensor
    assert early.keys() != now.keys()
    built = models_module._load("vae", cast(Any, Read(early)))
    assert built.state_dict().keys() == now.keys()
