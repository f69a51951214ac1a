"""Reading weights: which files, where to, and whole however many threads read."""

import logging
import os
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

from sdxl_worker.drawing.batches import WORKING_MEMORY_BYTES, fits
from sdxl_worker.errors import ModelError
from sdxl_worker.loading import models as models_module
from sdxl_worker.loading import weights as weights_module
from sdxl_worker.loading.model_dir import ModelDir
from sdxl_worker.loading.weight_files import network_files, read_ahead, weight_files
from sdxl_worker.loading.weights import Placement, Weights, start_reading
from sdxl_worker.settings import EMBEDDED_MODEL_DIR

EMBEDDED = ModelDir(EMBEDDED_MODEL_DIR, EMBEDDED_MODEL_DIR / "base", EMBEDDED_MODEL_DIR / "refiner")
CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


def test_the_base_is_read_before_the_refiner() -> None:
    files = network_files(EMBEDDED, half_precision=True)
    assert list(files)[-1] == "refiner/unet"
    assert len(files) == 5


def test_every_thread_s_part_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of one network, each in many parts, whole numbers among the tensors."""
    monkeypatch.setattr(weights_module, "PART_BYTES", 500)
    tensors = {f"t{i}": torch.randn(i + 1, 10) for i in range(30)}
    save_file({name: tensors[name] for name in list(tensors)[:12]}, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in list(tensors)[12:]}, tmp_path / "two.safetensors")
    save_file({"ids": torch.arange(5)}, tmp_path / "three.safetensors")
    files = weight_files(tmp_path, half_precision=False)
    assert sum(1 for file in files for _ in weights_module._parts(file)) > 5
    narrow = Placement(torch.device("cpu"), torch.float16, resident=True)
    read = Weights(EMBEDDED, {"network": files}, narrow).take("network")
    assert read.pop("ids").tolist() == [0, 1, 2, 3, 4]
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.half())


def test_parts_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    files = weight_files(EMBEDDED_MODEL_DIR / "base" / "unet", half_precision=True)
    together = threading.Barrier(8, timeout=30)
    monkeypatch.setattr(weights_module, "_parts", lambda _: ([str(i)] for i in range(8)))
    monkeypatch.setattr(weights_module, "_read", lambda _, names, *__: {names[0]: together.wait()})
    assert len(Weights(EMBEDDED, {"network": files}, CPU).take("network")) == 8


def test_numbers_are_rounded_where_they_go() -> None:
    """On a GPU that is much faster; in one call, torch would round on the host."""
    moved: list[tuple[str, torch.dtype]] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            moved.append((out.device.type, out.dtype))
            return out

    tensor = torch.ones(3)
    with Noted():
        weights_module._to(tensor, torch.device("meta"), torch.float16)
    assert moved == [("meta", torch.float32), ("meta", torch.float16)]


def test_a_part_that_cannot_be_read_fails_the_network(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"t": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="one.safetensors cannot be read"):
        Weights(EMBEDDED, {"network": [path]}, CPU)


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
    now = Weights(EMBEDDED, {"n": weight_files(folder, half_precision=True)}, CPU).take("n")
    old = {f"text_model.{name}": tensor for name, tensor in now.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    built = [
        models_module._build(CLIPTextModel, cast(Any, Read(tensors)), "base/text_encoder")
        for tensors in (now, old)
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
    folder = EMBEDDED.folder("base/vae")
    now = Weights(EMBEDDED, {"n": weight_files(folder, half_precision=True)}, CPU).take("n")
    early_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    early = {}
    for name, tensor in now.items():
        for part, early_part in early_names.items():
            name = name.replace(f"attentions.0.{part}.", f"attentions.0.{early_part}.")
        early[name] = tensor
    assert early.keys() != now.keys()
    built = models_module._build(AutoencoderKL, cast(Any, Read(early)), "base/vae")
    assert built.state_dict().keys() == now.keys()


@pytest.mark.parametrize(("missing_bytes", "resident"), [(0, True), (1, False)])
def test_weights_stay_on_the_gpu_where_they_leave_room_to_work(
    missing_bytes: int,
    resident: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU is not at hand: its memory is a number here, and reading ends before it begins."""
    caplog.set_level(logging.INFO)
    files = network_files(EMBEDDED, half_precision=True)
    numbers = sum(weights_module._numbers(path) for [path] in files.values())
    free_bytes = 2 * numbers + WORKING_MEMORY_BYTES - missing_bytes  # float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 0))
    monkeypatch.setattr(weights_module, "_read", lambda *_: {})
    placement = start_reading(EMBEDDED, None).placement
    assert placement == Placement(torch.device("cuda"), torch.float16, resident)
    assert ("resident" in caplog.text) == resident
    assert ("too small" in caplog.text) == (not resident)


def test_weights_that_do_not_stay_on_the_gpu_are_read_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = set()

    def read(*arguments: Any) -> dict[str, torch.Tensor]:
        targets.add(arguments[2])
        return {}

    monkeypatch.setattr(weights_module, "_read", read)
    files = network_files(EMBEDDED, half_precision=True)
    for resident, target in ((False, "cpu"), (True, "cuda")):
        targets.clear()
        weights = Weights(EMBEDDED, files, Placement(torch.device("cuda"), torch.float16, resident))
        weights.take("base/unet")
        weights.take("refiner/unet")
        assert targets == {torch.device(target)}


def test_the_weights_of_sdxl_fit_a_card_of_24_gb_and_not_one_of_16() -> None:
    sdxl_bytes = 11_460_000_000
    assert fits(sdxl_bytes, 23_000_000_000)
    assert not fits(sdxl_bytes, 16_000_000_000)


def test_reading_ahead_asks_for_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]))
    by_network = network_files(EMBEDDED, half_precision=True)
    read_ahead([path for paths in by_network.values() for path in paths]).join()
    assert asked == [(0, 0, os.POSIX_FADV_WILLNEED)] * 5
