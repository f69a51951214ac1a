"""From nothing to a worker that draws."""

import asyncio
import gc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.errors import ModelError
from sdxl_worker.loading.weights import Weights
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.start import ready_models, start
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.support import REPOSITORY


@pytest.fixture
def _nothing_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start is one from the beginning."""
    monkeypatch.setattr(start_module, "_starts", {})


def test_models_are_loaded_once() -> None:
    assert start(Settings()).result() is start(Settings()).result()
    assert asyncio.run(ready_models(Settings())) is start(Settings()).result()


@pytest.mark.usefixtures("_nothing_begun")
def test_the_base_draws_before_the_refiner_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what only the first picture costs is spent while weights are still being read."""
    order: list[Any] = []
    generate, take = generate_module.generate, Weights.take

    def drawn(request: Any, stages: Any, loaded: Any, **options: Any) -> Any:
        order.append(f"drawn {'with' if loaded.refiner_unet is not None else 'without'} refiner")
        return generate(request, stages, loaded, **options)

    def taken(weights: Weights, network: str) -> Any:
        order.append(network)
        return take(weights, network)

    monkeypatch.setattr(generate_module, "generate", drawn)
    monkeypatch.setattr(Weights, "take", taken)
    start(Settings()).result()
    assert order[-3:] == ["drawn without refiner", "refiner_unet", "drawn with refiner"]
    assert sum(str(what).startswith("drawn") for what in order) == 2


@pytest.mark.usefixtures("_nothing_begun")
def test_start_up_draws_a_picture_with_the_base_and_one_with_the_refiner(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    start(Settings()).result()
    told = [record for record in caplog.records if "seconds" in vars(record)]
    assert [record.getMessage().partition(" in ")[0] for record in told] == [
        "imported the libraries",
        "loaded the base",
        "drew a first picture",
        "loaded the refiner",
        "drew a first picture",
    ]
    assert all(isinstance(vars(record)["seconds"], float) for record in told)


@pytest.mark.usefixtures("_nothing_begun")
def test_an_empty_picture_at_start_up_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Image.new("RGB", (64, 64))
    monkeypatch.setattr(generate_module, "generate", lambda *_, **__: [empty])
    with pytest.raises(ModelError, match="draw an empty picture"):
        start(Settings()).result()


@pytest.mark.parametrize("network", ["base/unet", "refiner/unet"])
def test_weights_that_are_not_numbers_end_the_worker(network: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(EMBEDDED_MODEL_DIR, tmp_path / "model"))
    [path] = (root / network).glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_out.bias"].fill_(torch.nan)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="draw an empty picture"):
        start(Settings(model_dir=root)).result()


@pytest.mark.parametrize("name", ["lora_dir", "models_dir"])
def test_a_folder_that_is_not_there_ends_the_worker(name: str, tmp_path: Path) -> None:
    settings = Settings(**{name: tmp_path / "missing"})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"{name.upper()}: .*missing must be a folder"):
        start(settings).result()


def test_a_start_that_failed_is_tried_again(tmp_path: Path) -> None:
    settings = Settings(model_dir=tmp_path / "model")
    with pytest.raises(ModelError, match="must be a folder"):
        start(settings).result()
    (tmp_path / "model").symlink_to(EMBEDDED_MODEL_DIR)
    assert start(settings).result().refiner_unet is not None


def test_files_are_read_ahead_before_the_libraries_are_imported() -> None:
    script = (
        "import sys\n"
        "import handler\n"
        "from sdxl_worker.serving import start\n"
        "from sdxl_worker.settings import Settings\n"
        "ahead = []\n"
        "def read_ahead(files):\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    ahead.extend(files)\n"
        "start.read_ahead = read_ahead\n"
        "start.start(Settings()).result()\n"
        "assert len(ahead) == 5, ahead\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


@pytest.mark.usefixtures("_nothing_begun")
def test_garbage_is_collected_again_once_the_worker_is_ready() -> None:
    gc.disable()
    try:
        start(Settings()).result()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.usefixtures("_nothing_begun")
def test_the_first_picture_waits_for_what_comes_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    generate = generate_module.generate

    def drawn(*arguments: Any, **options: Any) -> Any:
        order.append("drawn")
        return generate(*arguments, **options)

    monkeypatch.setattr(generate_module, "generate", drawn)
    start(Settings(), before_drawing=lambda: order.append("before")).result()
    assert order == ["before", "drawn", "drawn"]
