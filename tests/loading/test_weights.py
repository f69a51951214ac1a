"""Reading weights: which files, where to, and whole however many threads read."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_worker.errors import ModelError
from sdxl_worker.loading import weights as weights_module
from sdxl_worker.loading.model_dir import ModelDir
from sdxl_worker.loading.weights import Weights, choose_placement, start_reading
from sdxl_worker.placement import WORKING_MEMORY_BYTES, Placement
from sdxl_worker.settings import EMBEDDED_MODEL_DIR

EMBEDDED = ModelDir(EMBEDDED_MODEL_DIR, EMBEDDED_MODEL_DIR / "base", EMBEDDED_MODEL_DIR / "refiner")
CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


def test_every_thread_s_part_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of one network, each in many parts, whole numbers among the tensors."""
    monkeypatch.setattr(weights_module, "PART_BYTES", 500)
    tensors = {f"t{i}": torch.randn(i + 1, 10) for i in range(30)}
    save_file({name: tensors[name] for name in list(tensors)[:12]}, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in list(tensors)[12:]}, tmp_path / "two.safetensors")
    save_file({"ids": torch.arange(5)}, tmp_path / "three.safetensors")
    files = sorted(tmp_path.iterdir())
    assert sum(1 for file in files for _ in weights_module._parts(file)) > 5
    narrow = Placement(torch.device("cpu"), torch.float16, resident=True)
    read = start_reading(EMBEDDED, {"network": files}, narrow).take("network")
    assert read.pop("ids").tolist() == [0, 1, 2, 3, 4]
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.half())


def test_parts_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    files = EMBEDDED.weight_files("float16")["unet"]
    together = threading.Barrier(8, timeout=30)

    def read(_: Path, names: list[str], *__: Any) -> dict[str, torch.Tensor]:
        return {names[0]: torch.tensor(together.wait())}

    monkeypatch.setattr(weights_module, "_parts", lambda *_: ([str(i)] for i in range(8)))
    monkeypatch.setattr(weights_module, "_read", read)
    assert len(start_reading(EMBEDDED, {"network": files}, CPU).take("network")) == 8


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
        start_reading(EMBEDDED, {"network": [path]}, CPU)


@pytest.mark.parametrize(("missing_bytes", "resident"), [(0, True), (1, False)])
def test_weights_stay_on_the_gpu_where_they_leave_room_to_work(
    missing_bytes: int,
    resident: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU is not at hand: its memory is a number here."""
    caplog.set_level(logging.INFO)
    files = EMBEDDED.weight_files("float16")
    numbers = sum(weights_module._numbers(path) for [path] in files.values())
    free_bytes = 2 * numbers + WORKING_MEMORY_BYTES - missing_bytes  # float16
    monkeypatch.setattr(weights_module, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 0))
    placement = choose_placement(files, None)
    assert placement == Placement(torch.device("cuda"), torch.float16, resident)
    assert ("resident" in caplog.text) == resident
    assert ("too small" in caplog.text) == (not resident)


@pytest.mark.parametrize(("dtype", "warned"), [("float16", True), ("bfloat16", False)])
def test_fp16_on_a_cpu_is_warned_of(
    dtype: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With SDXL's weights, a worker did not come to its first picture within ten minutes."""
    monkeypatch.setattr(weights_module, "choose_device", lambda: torch.device("cpu"))
    choose_placement(EMBEDDED.weight_files("float16"), dtype)
    assert ("DTYPE is float16 and there is no GPU" in caplog.text) == warned


def test_weights_that_do_not_stay_on_the_gpu_are_read_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = set()

    def read(*arguments: Any) -> dict[str, torch.Tensor]:
        targets.add(arguments[2])
        return {}

    monkeypatch.setattr(weights_module, "_read", read)
    files = EMBEDDED.weight_files("float16")
    for resident, target in ((False, "cpu"), (True, "cuda")):
        targets.clear()
        placement = Placement(torch.device("cuda"), torch.float16, resident)
        weights = start_reading(EMBEDDED, files, placement)
        weights.take("unet")
        weights.take("refiner_unet")
        assert targets == {torch.device(target)}


def test_a_gpu_is_copied_to_on_a_stream_of_its_own_and_all_is_there_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No GPU is here: what is seen is what would be told to one, in which order."""
    told: list[str] = []

    class Stream:
        def __init__(self) -> None:
            told.append("made")

        def synchronize(self) -> None:
            told.append("waited for")

    @contextlib.contextmanager
    def current(stream: Stream) -> Iterator[None]:
        assert isinstance(stream, Stream)
        told.append("begun")
        yield
        told.append("ended")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    weights_module._stream.cache_clear()
    try:
        for _ in range(2):
            with weights_module._on_own_stream(torch.device("cuda")):
                told.append("copied")
    finally:
        weights_module._stream.cache_clear()
    assert told == ["made", *(["begun", "copied", "ended", "waited for"] * 2)]


def test_parts_for_a_gpu_are_copied_within(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = threading.local()
    parts: list[str] = []

    @contextlib.contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        assert device.type == "meta"
        parts.append("begun")
        inside.yes = True
        yield
        inside.yes = False

    def to(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        assert inside.yes
        return tensor

    monkeypatch.setattr(weights_module, "_on_own_stream", noted)
    monkeypatch.setattr(weights_module, "_to", to)
    placement = Placement(torch.device("meta"), torch.float32, resident=True)
    start_reading(EMBEDDED, EMBEDDED.weight_files("float16"), placement).take("vae")
    assert parts


def test_what_is_handed_over_is_not_written_to_before_the_one_who_takes_it_has_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network that is laid out otherwise frees its tensors at once, while the GPU has yet to
    read them, and threads go on reading into what is free."""
    here = object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    told: list[object] = []

    class Tensor:
        def __init__(self, is_cuda: bool) -> None:
            self.is_cuda = is_cuda

        def record_stream(self, stream: object) -> None:
            told.append((self, stream))

    tensors: Any = {"a": Tensor(is_cuda=True), "b": Tensor(is_cuda=False)}
    part: Future[Any] = Future()
    part.set_result(tensors)
    assert Weights(EMBEDDED, CPU, {"unet": [part]}).take("unet") == tensors
    assert told == [(tensors["a"], here)]
