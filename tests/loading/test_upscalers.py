"""Which upscaler a name means, and what is loaded of its file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.loading.upscalers import (
    Upscaler,
    UpscalerFiles,
    find_upscaler,
    names_of_upscalers,
)
from sdxl_worker.placement import Placement
from tests.small_upscalers import compact, write
from tests.support import REPOSITORY

IN_FLOAT32 = Placement(torch.device("cpu"), torch.float32, resident=True)
IN_FLOAT16 = Placement(torch.device("cpu"), torch.float16, resident=True)
IN_BFLOAT16 = Placement(torch.device("cpu"), torch.bfloat16, resident=True)
PIXELS = torch.rand((1, 3, 9, 12), generator=torch.Generator().manual_seed(0))


def load(path: Path, placement: Placement = IN_FLOAT32) -> Any:
    return UpscalerFiles(path).load(placement)


class TestNames:
    @pytest.fixture
    @staticmethod
    def folder(tmp_path: Path) -> Path:
        for name in ("4x_a.pth", "c.pt", "read.me"):
            (tmp_path / name).touch()
        for name in ("4x_b.safetensors", "c.pth.safetensors"):
            write(tmp_path / name, compact())
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("4x_a", "4x_a.pth"),
            ("4x_a.pth", "4x_a.pth"),
            ("4x_b", "4x_b.safetensors"),
            ("c", "c.pt"),
            ("c.pth", "c.pth.safetensors"),
        ],
    )
    def test_a_file_is_named_with_or_without_its_ending(
        self, folder: Path, name: str, file: str
    ) -> None:
        found = find_upscaler(name, folder, "upscale.upscaler")
        assert found is not None
        assert found.path == folder / file
        assert found.title == f"the upscaler {file}"

    def test_lanczos_needs_no_file(self, folder: Path) -> None:
        assert find_upscaler("lanczos", folder, "upscale.upscaler") is None
        assert find_upscaler("lanczos", None, "upscale.upscaler") is None

    @pytest.mark.parametrize("name", ["4x_c", "read.me", "read", "../4x_a.pth", "..", "LANCZOS"])
    def test_of_an_unknown_one_it_is_told_which_there_are(self, folder: Path, name: str) -> None:
        with pytest.raises(RequestError) as caught:
            find_upscaler(name, folder, "hires.upscaler")
        assert str(caught.value) == (
            f"hires.upscaler: this worker has no upscaler {name}; it has lanczos, 4x_a, 4x_b, c, "
            "c.pth"
        )

    @pytest.mark.parametrize("content", [b"", b"junk", b"<html>", b"\x10" + 30 * b"\0"])
    def test_a_file_that_is_none_is_told_when_it_is_found(
        self, folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        (folder / "junk.safetensors").write_bytes(content)
        with pytest.raises(RequestError) as caught:
            find_upscaler("junk", folder, "upscale.upscaler")
        assert str(caught.value) == (
            "upscale.upscaler: junk.safetensors cannot be read as an upscaler; the worker's owner "
            "should fetch it again"
        )
        assert "UPSCALER_DIR: junk.safetensors is " in caplog.text

    def test_all_names_are_there_for_a_report(self, folder: Path) -> None:
        assert names_of_upscalers(folder) == ["lanczos", "4x_a", "4x_b", "c", "c.pth"]
        assert names_of_upscalers(None) == names_of_upscalers(folder / "none") == ["lanczos"]

    def test_of_very_many_not_all_are_told(self, tmp_path: Path) -> None:
        for i in range(30):
            (tmp_path / f"{i}.pth").touch()
        with pytest.raises(RequestError, match="and 11 more$"):
            find_upscaler("x", tmp_path, "hires.upscaler")

    def test_without_a_folder_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="^hires.upscaler: this worker has no upscaler but"):
            find_upscaler("4x_a", None, "hires.upscaler")
        with pytest.raises(RequestError, match="^hires.upscaler: .* cannot be read: No such file"):
            find_upscaler("4x_a", tmp_path / "none", "hires.upscaler")

    def test_without_spandrel_it_is_told_what_to_install(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "spandrel", None)  # what Python takes for "not there"
        with pytest.raises(RequestError, match=r"^hires.upscaler: .* requirements-control\.txt"):
            find_upscaler("4x_a", folder, "hires.upscaler")
        assert find_upscaler("lanczos", folder, "hires.upscaler") is None
        with pytest.raises(ModelError, match=r"^UPSCALER_DIR: .* requirements-control\.txt"):
            load(folder / "4x_a.pth")


class TestFiles:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
    def test_a_network_makes_a_picture_as_often_as_large(self, tmp_path: Path, suffix: str) -> None:
        tensors = compact(scale=3)
        network = load(write(tmp_path / f"a{suffix}", tensors))
        assert isinstance(network, Upscaler)
        assert network.scale == 3
        assert not network.training
        assert not any(one.requires_grad for one in network.parameters())
        larger = network(PIXELS)
        assert larger is not None
        assert larger.shape == (1, 3, 27, 36)
        kept = {name.removeprefix("network."): one for name, one in network.state_dict().items()}
        assert kept.keys() == tensors.keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())

    def test_a_file_of_its_trainer_holds_the_tensors_under_a_name(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pth"
        torch.save({"params_ema": compact(), "iter": 5}, path)
        assert load(path).scale == 2

    def test_it_is_in_half_precision_where_the_worker_is_and_the_architecture_takes_it(
        self, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "a.safetensors", compact())
        assert load(path, IN_FLOAT32).dtype == torch.float32
        assert load(path, IN_FLOAT16).dtype == torch.float16
        assert load(path, IN_BFLOAT16).dtype == torch.float16

    def test_its_size_is_told_before_it_is_loaded(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.safetensors", compact())
        tensors = sum(tensor.nbytes for tensor in compact().values())
        assert tensors <= UpscalerFiles(path).size_bytes(torch.float16) <= tensors + 2000
        with pytest.raises(ModelError, match=r"^UPSCALER_DIR: b.pth cannot be read: No such file"):
            UpscalerFiles(tmp_path / "b.pth").size_bytes(torch.float16)

    def test_a_pickle_that_would_run_something_runs_nothing(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"

        class Malicious:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(marker),)

        for name in ("a.pth", "a.pt"):
            torch.save({**compact(), "more": Malicious()}, tmp_path / name)
            with pytest.raises(
                ModelError, match="^UPSCALER_DIR: a.pth? is refused: .* safetensors"
            ):
                load(tmp_path / name)
        assert not marker.exists()
        torch.load(tmp_path / "a.pth", weights_only=False)
        assert marker.exists(), "it would have"

    @pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
    def test_torchscript_is_not_run(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 3, 1), PIXELS), path)
        with pytest.raises(ModelError, match="^UPSCALER_DIR: a.pt is refused"):
            load(path)

    @pytest.mark.parametrize(
        ("tensors", "problem"),
        [
            (compact(scale=1), "is a network for something else (Restoration), not an upscaler"),
            (compact(channels=1), "is for pictures of 1 channels, not of 3 (RGB)"),
            (compact(scale=9), "makes pictures 9 times as large; the most is 8"),
            ({"some.weight": torch.ones(3)}, "is no network of a kind that spandrel knows"),
        ],
    )
    def test_other_networks_are_refused_by_name(
        self, tmp_path: Path, tensors: Any, problem: str
    ) -> None:
        path = write(tmp_path / "a.safetensors", tensors)
        with pytest.raises(ModelError) as caught:
            load(path)
        assert str(caught.value) == f"UPSCALER_DIR: a.safetensors {problem}"

    def test_what_only_looks_like_a_network_is_refused(self, tmp_path: Path) -> None:
        tensors = compact()
        tensors["body.2.weight"] = tensors["body.2.weight"][:4]
        with pytest.raises(ModelError, match="^UPSCALER_DIR: a.pth cannot be loaded: "):
            load(write(tmp_path / "a.pth", tensors))

    @pytest.mark.parametrize(
        ("name", "problem"),
        [("a.safetensors", "is broken: "), ("a.pth", "is refused: it holds more than tensors, or")],
    )
    def test_a_broken_file_is_refused(self, tmp_path: Path, name: str, problem: str) -> None:
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(ModelError, match=f"^UPSCALER_DIR: {name} {problem}"):
            load(tmp_path / name)

    def test_a_file_of_something_else_than_tensors_by_name_is_refused(self, tmp_path: Path) -> None:
        torch.save([torch.ones(1)], tmp_path / "a.pth")
        with pytest.raises(ModelError, match="^UPSCALER_DIR: a.pth holds no tensors by name"):
            load(tmp_path / "a.pth")


WITHOUT_TORCHVISION = """
import importlib.util, sys
if importlib.util.find_spec("torchvision") is not None:
    sys.modules["torchvision"] = None  # what Python takes for "not there"
from sdxl_worker.loading.upscalers import _spandrel
assert _spandrel().MAIN_REGISTRY
left = [name for name, module in sys.modules.items() if name.startswith("torchvision") and module]
assert left == [], left
assert importlib.util.find_spec("torchvision") is None
from transformers.utils import is_torchvision_available
assert not is_torchvision_available()
"""


def test_spandrel_is_imported_without_torchvision_and_nothing_stands_in_for_it_afterwards() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCHVISION], cwd=REPOSITORY, check=True)
