"""Models in MODELS_DIR: what their names are, and what a wrong name is answered with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_worker.errors import RequestError
from sdxl_worker.loading.model_dir import ModelDir, find_model_dir
from sdxl_worker.loading.models_by_name import find_by_name
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tools import original_format


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tensors = original_format.base_checkpoint(EMBEDDED_MODEL_DIR / "base")
    original_format.save(tensors, folder / "photo.v1.safetensors")
    (folder / "whole").symlink_to(EMBEDDED_MODEL_DIR)
    (folder / "alone").symlink_to(EMBEDDED_MODEL_DIR / "base")
    (folder / "models--org--x" / "snapshots").mkdir(parents=True)
    (folder / "models--org--x" / "snapshots" / "1").symlink_to(EMBEDDED_MODEL_DIR / "base")
    (folder / "empty").mkdir()
    (folder / "sdxl-configs").mkdir()
    (folder / ".hidden.safetensors").touch()
    (folder / "notes.txt").touch()
    (folder / "page.safetensors").write_text("<html>Log in</html>")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, folder / "style.safetensors")
    return folder


def find(name: str, settings: Settings) -> ModelDir:
    return find_by_name(name, settings, find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR)))


def refusal(name: str, folder: Path | None) -> str:
    with pytest.raises(RequestError) as caught:
        find(name, Settings(models_dir=folder))
    message = str(caught.value)
    assert message.startswith("model: ")
    assert folder is None or str(folder) not in message
    return message


@pytest.mark.parametrize("name", ["photo.v1", "photo.v1.safetensors"])
def test_a_file_is_named_with_or_without_its_ending(name: str, folder: Path) -> None:
    found = find(name, Settings(models_dir=folder))
    assert found.root == folder / "photo.v1.safetensors"
    assert found.name == "photo.v1"


def test_a_folder_is_named_as_it_is(folder: Path) -> None:
    settings = Settings(models_dir=folder)
    assert find("whole", settings).refiner is not None
    assert find("alone", settings).refiner is None
    assert find("models--org--x", settings).name == "org/x"


def test_the_worker_s_own_model_has_a_name_too(folder: Path, tmp_path: Path) -> None:
    for models_dir in (folder, tmp_path, None):
        assert find("shapes", Settings(models_dir=models_dir)).root == EMBEDDED_MODEL_DIR
    (tmp_path / "shapes").symlink_to(EMBEDDED_MODEL_DIR / "base")
    assert find("shapes", Settings(models_dir=tmp_path)).root != EMBEDDED_MODEL_DIR


def test_vae_dir_holds_for_all_of_them_and_prediction_type_for_none(folder: Path) -> None:
    vae = EMBEDDED_MODEL_DIR / "base" / "vae"
    settings = Settings(models_dir=folder, vae_dir=vae, prediction_type="v_prediction")
    found = find("photo.v1", settings)
    assert (found.vae, found.prediction_type) == (vae, None)


@pytest.mark.parametrize("name", ["phot.v1", "PHOTO.V1", "photo-v1.safetensors"])
def test_a_name_that_is_not_there_is_answered_with_those_that_are(name: str, folder: Path) -> None:
    assert refusal(name, folder) == (
        f'model: this worker has no "{name}" (did you mean photo.v1?); it has "alone", '
        '"models--org--x", "page", "photo.v1", "style", "whole"; left out, the field means "shapes"'
    )


@pytest.mark.parametrize(
    "name",
    ["", ".hidden", "notes.txt", "sdxl-configs", "whole.safetensors", "../models/whole", "/"],
)
def test_other_names_lead_nowhere(name: str, folder: Path) -> None:
    assert "this worker has no " in refusal(name, folder)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"m{i:02}" / "base").mkdir(parents=True)
    message = refusal("x", tmp_path)
    assert '"m19" and 5 more' in message
    assert "m20" not in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("style", "model: style.safetensors is a LoRA: name it in a request's `loras`"),
        ("page", "model: page.safetensors is a web page"),
        ("empty", 'model: "empty" is no model: a folder must hold base/'),
    ],
)
def test_what_is_no_model_is_told(name: str, message: str, folder: Path) -> None:
    assert refusal(name, folder).startswith(message)


def test_without_models_it_is_said_what_is_missing(tmp_path: Path) -> None:
    assert "let the worker's owner set MODELS_DIR" in refusal("x", None)
    assert 'this worker has one model, "shapes", and' in refusal("x", None)
    assert "it has none: its MODELS_DIR has no models" in refusal("x", tmp_path)
    assert "it has none: its MODELS_DIR has no models" in refusal("x", tmp_path / "missing")
